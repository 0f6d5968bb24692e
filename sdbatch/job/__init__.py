"""The job file as frozen pydantic models: load it, override keys, print its JSON Schema.

Nothing here touches the prompt table, the model or the output, and no torch or ray is loaded.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sdbatch.errors import JobError, short_repr
from sdbatch.job import strict_yaml
from sdbatch.job.sections import (
    COLUMNS,
    PICTURES,
    READER_KEYS,
    TABLE_FORMATS,
    Cluster,
    EngineSettings,
    Growing,
    Job,
    Model,
    Output,
    Prompts,
    Reader,
    Safety,
    model_section,
)
from sdbatch.job.serving import Limits, Serve
from sdbatch.job.strict_yaml import MAX_CHARACTERS
from sdbatch.job.validation import describe_error, describe_key, errors_by_key
from sdbatch.sampling import Sampling
from sdbatch.section import Section

__all__ = [
    "COLUMNS",
    "PICTURES",
    "READER_KEYS",
    "TABLE_FORMATS",
    "Cluster",
    "EngineSettings",
    "Growing",
    "Job",
    "Limits",
    "Model",
    "Output",
    "Prompts",
    "Reader",
    "Safety",
    "Sampling",
    "Section",
    "Serve",
    "describe_error",
    "describe_key",
    "errors_by_key",
    "json_schema",
    "load",
    "parse",
]


def load(path: str | Path, overrides: Sequence[str] = ()) -> Job:
    """Read the job file at `path`; each override is `section.key=value`, its value in YAML.

    Raises:
        JobError: the file cannot be read, or a key is wrong: names it and what it must be.
    """
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(MAX_CHARACTERS + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"{path} = {error}: must be a readable job file in YAML.") from error
    if len(text) > MAX_CHARACTERS:
        raise JobError(
            f"{path} = more than {MAX_CHARACTERS:,} characters: must be fewer. Put prompts into a "
            f"table, prompts.path."
        )
    return parse(strict_yaml.parse(text, str(path)), overrides, str(path))


def parse(values: Any, overrides: Sequence[str] = (), where: str = "the job") -> Job:
    """Build a job from the mapping `values` that YAML gives; errors call the file `where`."""
    if not isinstance(values, dict):
        raise JobError(f"{where} = not a mapping: must have prompts, model and output.")
    for override in overrides:
        values = _apply_override(values, override)
    try:
        return Job.model_validate(values)
    except ValidationError as error:
        raise JobError(describe_error(error)) from error


def json_schema() -> str:
    """Return the job file's JSON Schema, for editors."""
    return json.dumps(Job.model_json_schema(), indent=2)


def _apply_override(values: dict[str, Any], override: str) -> dict[str, Any]:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise JobError(f"--set {override!r}: must be section.key=value.")
    value = strict_yaml.parse(text, f"--set {override}") if text else ""
    return _set_key(values, name.split("."), value, override)


def _set_key(values: Any, keys: list[str], value: Any, override: str) -> dict[str, Any]:
    if isinstance(values, str) and override.startswith("model."):
        values = model_section(values)
    if not isinstance(values, dict | None):
        raise JobError(
            f"--set {override!r}: {keys[0]!r} is inside {short_repr(values)}, which is not a "
            f"section."
        )
    values = values or {}
    first, *rest = keys
    return {**values, first: _set_key(values.get(first), rest, value, override) if rest else value}

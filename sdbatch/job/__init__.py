"""The job file: what is asked for, as frozen pydantic models; load, overrides, JSON Schema.

Nothing here touches the prompt table, the model or the output, and no torch or ray is loaded.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sdbatch.errors import JobError
from sdbatch.job import strict_yaml
from sdbatch.job.explain import explain
from sdbatch.job.sections import (
    MAX_SEED,
    Cluster,
    Column,
    EngineSettings,
    Growing,
    Job,
    Model,
    Output,
    Prompts,
    Safety,
    Sampling,
    path_alone,
)
from sdbatch.job.serving import Limits, Serve
from sdbatch.section import Section

__all__ = [
    "MAX_SEED",
    "Cluster",
    "Column",
    "EngineSettings",
    "Growing",
    "Job",
    "Limits",
    "Model",
    "Output",
    "Prompts",
    "Safety",
    "Sampling",
    "Section",
    "Serve",
    "explain",
    "json_schema",
    "load",
    "parse",
]


def load(path: str | Path, overrides: Sequence[str] = ()) -> Job:
    """Read the job file at `path`; each override is `section.key=value`, its value in YAML.

    Raises:
        JobError: the file cannot be read, or is no job: says which key and what it must be.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"{path} = {error}: must be a readable job file in YAML.") from error
    return parse(strict_yaml.parse(text, str(path)), overrides, str(path))


def parse(values: Any, overrides: Sequence[str] = (), where: str = "the job") -> Job:
    """Build a job from the mapping `values`, as YAML gives it; `where` it stands."""
    if not isinstance(values, dict):
        raise JobError(f"{where} = no mapping: must have prompts, model and output.")
    for override in overrides:
        values = _override(values, override)
    try:
        return Job.model_validate(values)
    except ValidationError as error:
        raise JobError(explain(error)) from error


def json_schema() -> str:
    """Return the job file's JSON Schema, for editors."""
    return json.dumps(Job.model_json_schema(), indent=2)


def _override(values: dict[str, Any], override: str) -> dict[str, Any]:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise JobError(f"--set {override!r}: must be section.key=value.")
    value = strict_yaml.parse(text, f"--set {override}") if text else ""
    return _set(values, name.split("."), value, override)


def _set(values: Any, keys: list[str], value: Any, override: str) -> dict[str, Any]:
    if isinstance(values, str) and override.startswith("model."):
        values = path_alone(values)
    if not isinstance(values, dict | None):
        raise JobError(
            f"--set {override!r}: {keys[0]!r} is inside {values!r}, which is no section."
        )
    values = values or {}
    head, *rest = keys
    return {**values, head: _set(values.get(head), rest, value, override) if rest else value}

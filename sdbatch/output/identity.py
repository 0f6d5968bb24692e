"""What can change a byte of `data/`: recorded when an output begins, compared when it resumes."""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sdbatch.errors import JobError, short_repr
from sdbatch.job import Job
from sdbatch.job.files import NamedFile, named_files, with_paths
from sdbatch.libraries import optional_libraries
from sdbatch.schema import Shard

WAYS = "Restore it, choose another output.path, or start again with --overwrite."
_COMMIT = re.compile(r"[0-9a-f]{40}")
_COMMIT_IN_PATH = re.compile(r"@[0-9a-f]{40}(?=/|$)")  # of a file on the hub
_SECTIONS = ("prompts", "model", "sampling", "engine", "output", "safety", "stages")

# Libraries whose version can change a byte of `data/`; a resume with another version is refused.
# Those of a GPU and of extras are added where they are installed.
LIBRARIES = (
    "sdbatch",
    "torch",
    "diffusers",
    "transformers",
    "tokenizers",
    "torchsde",
    "scipy",
    "numpy",
    "pillow",
    "pyarrow",
)


def versions() -> dict[str, str]:
    """Return the versions of LIBRARIES and of optional ones, read without importing them."""
    return {name: version(name) for name in LIBRARIES} | optional_libraries()


def identity(job: Job, libraries: dict[str, str]) -> dict[str, Any]:
    """Return all that changes bytes of `data/` besides the table, as plain nested values.

    Files are listed by name: their hash, which is in it too, identifies them wherever they are. A
    model.config stays whole, as it may be a hub id, which has no hash.
    """
    values = with_paths(job, _file_name).model_dump(mode="json")
    sections = {name: values[name] for name in _SECTIONS}
    del sections["prompts"]["path"], sections["output"]["path"]
    return {**sections, "versions": libraries}


def _file_name(file: NamedFile) -> str:
    on_hub = file.kind.hub and _COMMIT_IN_PATH.search(file.path) is not None
    whole = on_hub or file.path.startswith("builtin:") or file.key == "model.config"
    return file.path if whole else Path(file.path).name


def fingerprint(job: Job, libraries: dict[str, str]) -> str:
    """Return the hash of `identity`: 16 hexadecimal digits."""
    text = json.dumps(identity(job, libraries), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def shard_fingerprint(fingerprint: str, shard: Shard) -> str:
    """Return the hash of a job's fingerprint and of a shard's rows: 16 hexadecimal digits."""
    text = json.dumps([fingerprint, asdict(shard)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def with_commits(job: Job, existing: Job) -> Job:
    """Fill the commits that the job leaves open of what is on the hub, as the output has them."""
    model = job.model
    if model.path == existing.model.path and model.revision is None:
        model = model.updated(revision=existing.model.revision)
    known = {
        (file.key, _without_commit(file.path)): file.path
        for file in named_files(existing.model)
        if file.kind.hub
    }

    def same_commit(file: NamedFile) -> str:
        return known.get((file.key, file.path), file.path)

    return job.updated(model=with_paths(model, same_commit))


def _without_commit(path: str) -> str:
    return _COMMIT_IN_PATH.sub("", path)


def adopt(job: Job, existing: Job) -> Job:
    """Fill what the job leaves open, such as `auto`, from the job of the existing output."""
    engine = {
        name: getattr(existing.engine, name) if value == "auto" else value
        for name, value in dict(job.engine).items()
    }
    model = {"sha256": job.model.sha256 or existing.model.sha256}
    if not _COMMIT.fullmatch(job.model.revision or ""):  # a branch or tag, not yet looked up
        model["revision"] = existing.model.revision
    size = job.output.images_per_shard
    if size == "auto":
        size = existing.output.images_per_shard
    return job.updated(
        engine=job.engine.updated(**engine),
        model=job.model.updated(**model),
        output=job.output.updated(images_per_shard=size),
    )


def check_unchanged(job: Job, existing: Job, libraries: dict[str, str]) -> None:
    """Raise a JobError for the first key whose value is not that of the existing output.

    Args:
        job: of this run.
        existing: the job of the output.
        libraries: their versions, as the output records them.
    """
    old, new = identity(existing, libraries), identity(job, versions())
    for name in _changed_keys(old, new):
        raise JobError(
            f"{name} = {short_repr(_value_at(new, name))}: must be "
            f"{short_repr(_value_at(old, name))}, as in the existing output. {WAYS}"
        )


def _changed_keys(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    """Yield the dotted names of the keys whose values differ between two nested mappings."""
    for key in [*old, *(key for key in new if key not in old)]:
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from (f"{key}.{name}" for name in _changed_keys(a, b))
        elif a != b:
            yield key


def _value_at(values: Any, name: str) -> Any:
    for part in name.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values

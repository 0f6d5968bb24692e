"""Which shards a job has, and whether an output that was begun is this job's.

A plan is a function of the job and the table alone: never of the cluster, the time or the place.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from sdbatch import schema
from sdbatch.errors import JobError, PromptTableError, StorageError
from sdbatch.job import Job, Output, parse
from sdbatch.prompts.table import Source, Table
from sdbatch.schema import Shard
from sdbatch.storage import Store

JOB_FILE = "job.yaml"
PLAN_FILE = "plan.parquet"
MOST_IMAGES = 1000  # in a shard that is cut automatically
AIM_BYTES = 256 * 2**20
MOST_BYTES = 2 * 2**30  # a shard is held in memory while it is drawn
SHARES, LEAST_IMAGES = 64, 32  # a small job is cut into up to 64 shards of at least 32 images

_COMMIT = re.compile(r"[0-9a-f]{40}")
_WAYS = "Restore it, choose another output.path, or start anew with --overwrite."

# Libraries whose version can change a byte of `data/`; a resume under another one is refused.
LIBRARIES = (
    "sdbatch",
    "torch",
    "diffusers",
    "transformers",
    "tokenizers",
    "peft",
    "torchsde",
    "scipy",
    "numpy",
    "pillow",
    "pyarrow",
)


@dataclass(frozen=True)
class Plan:
    """The shards of a job, in order, and the table that they are cut from."""

    job: Job  # with output.images_per_shard resolved
    table: Table
    shards: tuple[Shard, ...]
    rows: int
    begun: bool  # the output holds this job already

    @property
    def images(self) -> int:
        """Return the number of images, drawn or failed, that the output will account for."""
        return sum(shard.images for shard in self.shards)

    def urls(self) -> dict[str, str]:
        """Return where the table's files are, by name."""
        return {source.name: source.url for source in self.table.sources}


@dataclass(frozen=True)
class Begun:
    """What an output says of the job that began it."""

    job: Job
    versions: dict[str, str]
    shards: tuple[Shard, ...]
    extras: pa.Schema


def make(job: Job, table: Table, begun: Begun | None) -> Plan:
    """Cut the table into shards; over an output that was begun, keep its shards and go on.

    Raises:
        JobError: the job is not the one that began the output (says which key), or a shard of
            the size asked for could not be held in memory.
        PromptTableError: a file that the begun output was cut from has changed or is gone.
    """
    if begun is not None:
        job = adopt(job, begun)
        refuse_changes(job, begun)
        if not begun.extras.equals(table.extras):
            raise PromptTableError(
                f"prompts.path = columns {', '.join(table.extras.names) or 'none'}: the output was "
                f"begun with {', '.join(begun.extras.names) or 'none'}, or other types. {_WAYS}"
            )
        table = replace(table, sources=_in_order(table, begun))
    rows = min(table.rows, job.prompts.limit or table.rows)
    size = images_per_shard(job, rows * job.prompts.images_per_row)
    job = job.model_copy(
        update={"output": job.output.model_copy(update={"images_per_shard": size})}
    )
    shards = tuple(_cut(job, table, size))
    if begun is not None and shards[: len(begun.shards)] != begun.shards:
        raise PromptTableError(
            "prompts.path = files that cut the begun output's shards otherwise: new rows may only "
            f"come in new files, with no prompts.limit in their way. {_WAYS}"
        )
    return Plan(job, table, shards, rows, begun is not None)


def image_bytes(output: Output, height: int, width: int) -> int:
    """Return a bound on the bytes of one encoded image: that of pure noise, and its metadata."""
    per_pixel = {"jpg": 1.2 if output.encoder_quality <= 95 else 2.0, "webp": 1.2, "png": 3.05}
    return int(height * width * per_pixel[output.image_format]) + 4096


def images_per_shard(job: Job, images: int) -> int:
    """Return how many images a shard holds: what the job says, or a choice from the job alone."""
    each = image_bytes(job.output, job.sampling.height, job.sampling.width)
    asked = job.output.images_per_shard
    if asked != "auto":
        if asked * each > MOST_BYTES:
            raise JobError(
                f"output.images_per_shard = {asked}: up to {asked * each / 2**30:.1f} GiB, and a "
                f"shard is held in memory while drawn. At most {MOST_BYTES // each} fit into 2 GiB."
            )
        return asked
    share = max(LEAST_IMAGES, -(-images // SHARES))
    return max(1, min(share, MOST_IMAGES, AIM_BYTES // each))


def _cut(job: Job, table: Table, size: int) -> Iterator[Shard]:
    left = job.prompts.limit or table.rows
    first_row = number = 0
    for source in table.sources:
        images = min(source.rows, left) * job.prompts.images_per_row
        for first in range(0, images, size):
            yield Shard(
                number, source.name, source.checksum, first_row, first, min(size, images - first)
            )
            number += 1
        first_row += source.rows
        left -= min(source.rows, left)


def _in_order(table: Table, begun: Begun) -> tuple[Source, ...]:
    """Return the files as the begun output took them, then the new ones."""
    now = {source.name: source for source in table.sources}
    known = {shard.source: shard.checksum for shard in begun.shards}
    for name, checksum in known.items():
        if name not in now:
            raise PromptTableError(
                f"prompts.path = {name} is gone: the output was begun with it. {_WAYS}"
            )
        if now[name].checksum != checksum:
            raise PromptTableError(
                f"prompts.path = {name} has changed since the output was begun. Put new rows into "
                f"a new file beside it. {_WAYS}"
            )
    return (*(now[name] for name in known), *(s for s in table.sources if s.name not in known))


def versions() -> dict[str, str]:
    """Return the versions of the libraries that can change a byte, read without importing them."""
    return {name: version(name) for name in LIBRARIES}


def identity(job: Job, libraries: dict[str, str]) -> dict[str, Any]:
    """Return all that changes bytes of `data/` beside the table, as plain nested values."""
    asked = job.model_dump(mode="json")
    prompts = {name: value for name, value in asked["prompts"].items() if name != "path"}
    output = {name: value for name, value in asked["output"].items() if name != "path"}
    model = {**_without_folders(asked["model"]), "path": job.model.name}
    return {
        "prompts": prompts,
        "model": model,
        "sampling": asked["sampling"],
        "engine": asked["engine"],
        "output": output,
        "safety": asked["safety"],
        "versions": libraries,
    }


def _without_folders(model: dict[str, Any]) -> dict[str, Any]:
    """Return the model's section with files by name: their hash, in it too, tells them apart."""
    beside = {
        kind: [{**one, "path": Path(one["path"]).name} for one in model[kind]]
        for kind in ("loras", "embeddings")
    }
    return {**model, **beside, "vae": model["vae"] and Path(model["vae"]).name}


def fingerprint(job: Job, libraries: dict[str, str]) -> str:
    """Return the hash of `identity`: 16 hexadecimal digits."""
    text = json.dumps(identity(job, libraries), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def adopt(job: Job, begun: Begun) -> Job:
    """Fill what the job leaves open, such as `auto`, from the job that began the output."""
    settings = {
        name: getattr(begun.job.engine, name) if value == "auto" else value
        for name, value in job.engine.model_dump().items()
    }
    model = {"sha256": job.model.sha256 or begun.job.model.sha256}
    if not _COMMIT.fullmatch(job.model.revision or ""):  # a branch or tag: not looked up yet
        model["revision"] = begun.job.model.revision
    size = job.output.images_per_shard
    if size == "auto":
        size = begun.job.output.images_per_shard
    return job.model_copy(
        update={
            "engine": job.engine.model_copy(update=settings),
            "model": job.model.model_copy(update=model),
            "output": job.output.model_copy(update={"images_per_shard": size}),
        }
    )


def refuse_changes(job: Job, begun: Begun) -> None:
    """Raise a JobError that names the first key whose value is not the begun output's."""
    old, new = identity(begun.job, begun.versions), identity(job, versions())
    for name in _changed(old, new):
        raise JobError(
            f"{name} = {_at(new, name)!r}: the output was begun with {_at(old, name)!r}. {_WAYS}"
        )


def _changed(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    """Yield the dotted names of the keys whose values differ between two nested mappings."""
    for key in [*old, *(key for key in new if key not in old)]:
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from (f"{key}.{name}" for name in _changed(a, b))
        elif a != b:
            yield key


def _at(values: Any, name: str) -> Any:
    for part in name.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def write(store: Store, plan: Plan) -> None:
    """Write plan.parquet, then job.yaml, which makes the folder an output."""
    libraries = versions()
    extras = plan.table.extras.serialize().to_pybytes()
    table = pa.Table.from_pylist(
        [asdict(shard) for shard in plan.shards], schema.PLAN.with_metadata({b"extras": extras})
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    store.put(PLAN_FILE, sink.getvalue().to_pybytes())
    said = {
        "fingerprint": fingerprint(plan.job, libraries),
        "versions": libraries,
        "job": plan.job.model_dump(mode="json"),
    }
    store.put(JOB_FILE, yaml.safe_dump(said, sort_keys=False, allow_unicode=True).encode())


def read(store: Store) -> Begun | None:
    """Return what the output says of the job that began it; None if there is no job.yaml."""
    text = store.find(JOB_FILE)
    if text is None:
        return None
    broken = (yaml.YAMLError, KeyError, TypeError, ValueError, OSError, pa.ArrowException, JobError)
    try:
        said = yaml.safe_load(text)
        job, libraries = parse(said["job"]), said["versions"]
    except broken as error:
        raise _unreadable(store.where(JOB_FILE), error) from error
    data = store.read(PLAN_FILE)
    try:
        table = pq.read_table(pa.BufferReader(data))
        extras = pa.ipc.read_schema(pa.py_buffer(table.schema.metadata[b"extras"]))
        return Begun(job, libraries, tuple(Shard(**row) for row in table.to_pylist()), extras)
    except broken as error:
        raise _unreadable(store.where(PLAN_FILE), error) from error


def _unreadable(where: str, error: Exception) -> StorageError:
    text = " ".join(str(error).split())[:200]
    return StorageError(
        f"{where} = {type(error).__name__}, {text}: must be as this version of sdbatch wrote it. "
        f"Choose another output.path."
    )

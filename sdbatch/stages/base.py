"""The interface of a stage, and the shard and facts that its tables carry.

Both are in the metadata of the table's schema, so that a stage stays a function of tables.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import pyarrow as pa

from sdbatch import registry
from sdbatch.errors import JobError
from sdbatch.job import Job
from sdbatch.schema import IMAGE, NO_COLUMNS, OUTPUT_NAMES, PLAN, Shard

_SHARD, _FACTS = b"shard", b"facts"


@dataclass(frozen=True)
class Needs:
    """What a stage needs to run."""

    cpus: float = 0  # none for a stage that works for moments: it may run when actors take all
    gpus: float = 0
    labels: Mapping[str, str] = field(default_factory=dict)  # of the machines that it may run on
    columns: Sequence[str] = ()  # of its table


class Stage(ABC):
    """A step that every shard takes; it may be called in many processes, for one shard a call."""

    name: str  # in metrics and logs
    # rows: as many rows as it gets. The source takes a row of the plan, the sink returns a receipt.
    kind: Literal["source", "rows", "sink"] = "rows"
    needs: Needs = Needs()
    adds: pa.Schema = NO_COLUMNS

    @abstractmethod
    def __call__(self, rows: pa.Table) -> pa.Table:
        """Process the table of one shard; a row that fails stays, with its `error`."""


def with_shard(rows: pa.Table, shard: Shard, facts: dict[str, Any] | None = None) -> pa.Table:
    """Return a table that carries its shard and facts for its receipt."""
    metadata = {_SHARD: json.dumps(asdict(shard)), _FACTS: json.dumps(facts or {})}
    return rows.replace_schema_metadata(metadata)


def shard_of(rows: pa.Table) -> Shard:
    """Return the shard of a table that `with_shard` made, or of a row of the plan."""
    if _SHARD in (rows.schema.metadata or {}):
        return Shard(**json.loads(rows.schema.metadata[_SHARD]))
    return Shard(**rows.select(PLAN.names).to_pylist()[0])


def facts_of(rows: pa.Table) -> dict[str, Any]:
    """Return the facts that a table carries."""
    facts: dict[str, Any] = json.loads((rows.schema.metadata or {}).get(_FACTS, "{}"))
    return facts


def replace_columns(rows: pa.Table, columns: Mapping[str, pa.Array | pa.ChunkedArray]) -> pa.Table:
    """Return `rows` with other values in some columns."""
    for name, column in columns.items():
        at = rows.schema.get_field_index(name)
        rows = rows.set_column(at, rows.schema.field(at), column)
    return rows


def image_column(images: Iterable[dict[str, Any] | None]) -> pa.ChunkedArray:
    """Return the column `image`, a chunk for each image, without a copy of any file."""
    return pa.chunked_array([_image_chunk(image) for image in images], IMAGE.type)


def replace_images(rows: pa.Table, images: Mapping[int, dict[str, Any] | None]) -> pa.Table:
    """Return `rows` with other images in some rows, without a copy of any file."""
    column, start = rows["image"], 0
    chunks: list[pa.Array] = []
    for index in sorted(images):
        chunks += [*column.slice(start, index - start).chunks, _image_chunk(images[index])]
        start = index + 1
    chunks += column.slice(start).chunks
    return replace_columns(rows, {"image": pa.chunked_array(chunks, IMAGE.type)})


def _image_chunk(image: dict[str, Any] | None) -> pa.Array:
    if image is None:
        return pa.nulls(1, IMAGE.type)
    offsets = pa.array([0, len(image["bytes"])], pa.int32()).buffers()[1]
    file = pa.Array.from_buffers(pa.binary(), 1, [None, offsets, pa.py_buffer(image["bytes"])])
    path = pa.array([image["path"]], pa.string())
    return pa.StructArray.from_arrays([file, path], fields=list(IMAGE.type))


def job_stages(job: Job) -> list[Stage]:
    """Return the stages of the job's `stages` section that look at the images."""
    entries = [
        entry for stage in job.stages for entry in stage.model_dump(exclude={"draw"}).items()
    ]
    return [registry.load(registry.STAGES[kind].module).make(value) for kind, value in entries]


def added_columns(job: Job) -> pa.Schema:
    """Return the columns that the job's `stages` section adds to the output.

    Raises:
        JobError: two stages add the same column, or one of the output's own.
    """
    fields = [field for stage in job_stages(job) for field in stage.adds]
    names = [*OUTPUT_NAMES, *(field.name for field in fields)]
    for name in names:
        if names.count(name) > 1:
            raise JobError(
                f"stages = {job.stages!r}: must add each column once, and {name!r} appears twice. "
                f"Remove a stage."
            )
    return pa.schema(fields)

"""A shard's table as a block of Ray Data, and the wrapper that runs a stage on blocks.

A block has one row, which holds a shard's whole table as an Arrow stream, and the files of its
images one after the other: so Ray never splits or joins shards. Packing writes the table once, and
its images may be in many chunks; nothing is copied to unpack it.
"""

import io

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sdbatch.batch.metrics import Metrics
from sdbatch.schema import IMAGE
from sdbatch.stages.base import Stage, facts_of, shard_of, with_shard

_ROWS, _FILES = "rows", "files"
MOST_CHUNK = 2**31 - 1  # bytes of the files in a chunk: Arrow's offsets have 32 bits


def pack(rows: pa.Table) -> pa.Table:
    """Return a block of one row that holds a table, with its metadata."""
    columns = {}
    if IMAGE in rows.schema:
        files = io.BytesIO()  # grows in place; Arrow's stream copies all that it has
        for chunk in rows[IMAGE.name].chunks:
            for file in chunk.field("bytes"):
                if file.is_valid:
                    files.write(file.as_buffer())
        columns[_FILES] = _one_value(pa.py_buffer(files.getvalue()))
        rows = _set_images(rows, _without_files(rows[IMAGE.name]))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema) as stream:
        stream.write_table(rows.combine_chunks())
    return pa.table({_ROWS: _one_value(sink.getvalue()), **columns})


def _one_value(data: pa.Buffer) -> pa.Array:
    offsets = pa.array([0, data.size], pa.int64()).buffers()[1]
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, data])


def _set_images(rows: pa.Table, images: pa.ChunkedArray) -> pa.Table:
    at = rows.schema.get_field_index(IMAGE.name)
    return rows.set_column(at, IMAGE.with_type(images.type), images)


def _without_files(images: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column of images with the length of each file instead of its bytes."""
    kind = pa.struct([("bytes", pa.int32()), ("path", pa.string())])
    chunks = []
    for chunk in images.chunks:
        parts = [pc.binary_length(chunk.field("bytes")), chunk.field("path")]
        chunks.append(pa.StructArray.from_arrays(parts, fields=list(kind), mask=chunk.is_null()))
    return pa.chunked_array(chunks, kind)


def unpack(block: pa.Table) -> pa.Table:
    """Return the table in a block; a block of the plan is its table."""
    if block.num_rows != 1:
        raise RuntimeError(f"a block of {block.num_rows} rows: a block holds exactly one shard")
    if _ROWS not in block.schema.names:
        return block
    rows = pa.ipc.open_stream(_value(block[_ROWS])).read_all()
    if _FILES not in block.schema.names:
        return rows
    return _set_images(rows, _with_files(rows[IMAGE.name], _value(block[_FILES])))


def _value(column: pa.ChunkedArray) -> pa.Buffer:
    """Return the only value of a column of bytes; a scalar would copy it."""
    array = column.chunk(0)
    _, offsets, data = array.buffers()
    start, stop = np.frombuffer(offsets, np.int64)[array.offset : array.offset + 2]
    return data.slice(start, stop - start)


def _with_files(images: pa.ChunkedArray, files: pa.Buffer) -> pa.ChunkedArray:
    """Return a column of images whose files are in `files`, in their order."""
    column = images.combine_chunks()
    lengths, paths = column.field("bytes"), column.field("path")
    ends = np.cumsum(lengths.fill_null(0).to_numpy(zero_copy_only=False), dtype=np.int64)
    chunks: list[pa.Array] = []
    start = first = 0  # row, and the first byte of its file
    while start < len(column):
        stop = int(np.searchsorted(ends, first + MOST_CHUNK, side="right"))
        offsets = np.concatenate([[0], ends[start:stop] - first]).astype(np.int32)
        part = slice(start, stop)
        validity = pa.array(lengths[part].is_valid().to_numpy(zero_copy_only=False)).buffers()[1]
        buffers = [validity, pa.py_buffer(offsets), files.slice(first, int(offsets[-1]))]
        data = pa.Array.from_buffers(pa.binary(), stop - start, buffers)
        chunks.append(
            pa.StructArray.from_arrays(
                [data, paths[part]], fields=list(IMAGE.type), mask=column[part].is_null()
            )
        )
        start, first = stop, int(ends[stop - 1])
    return pa.chunked_array(chunks, IMAGE.type)


class BlockStage:
    """A stage as Ray Data calls it: with blocks, counted and timed, its contract checked."""

    def __init__(self, stage: Stage, metrics: Metrics) -> None:
        self._stage = stage
        self._metrics = metrics

    def __call__(self, block: pa.Table) -> pa.Table:
        """Run the stage on the shard in `block`."""
        rows = unpack(block)
        shard = shard_of(rows)
        check_columns(self._stage, rows)
        with self._metrics.stage(self._stage.name, shard.shard):
            result = self._stage(rows)
        if self._stage.kind == "sink":
            return result
        result = carry_on(self._stage, rows, result)
        if self._stage.kind == "rows":
            self._metrics.images(dropped=_failed(result) - _failed(rows))
        return pack(result)


def check_columns(stage: Stage, rows: pa.Table) -> None:
    """Raise a RuntimeError if a column is missing that the stage needs."""
    missing = [name for name in stage.needs.columns if name not in rows.schema.names]
    if missing:
        raise RuntimeError(f"stage {stage.name}: needs the column {', '.join(missing)}")


def carry_on(stage: Stage, rows: pa.Table, result: pa.Table) -> pa.Table:
    """Return the result of a stage with its shard's number and all facts so far.

    Raises:
        RuntimeError: the stage lost rows, or did not add its columns with their types.
    """
    if stage.kind == "rows" and result.num_rows != rows.num_rows:
        raise RuntimeError(
            f"stage {stage.name}: {result.num_rows} rows of {rows.num_rows}: a stage keeps all rows"
        )
    missing = [field for field in stage.adds if field not in result.schema]
    if missing:
        raise RuntimeError(f"stage {stage.name}: did not add {', '.join(map(str, missing))}")
    return with_shard(result, shard_of(rows), {**facts_of(rows), **facts_of(result)})


def _failed(rows: pa.Table) -> int:
    return len(rows) - int(rows["error"].null_count) if "error" in rows.schema.names else 0

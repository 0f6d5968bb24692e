"""A shard's table as a block of Ray Data, and the wrapper that runs a stage on blocks.

A block has one row, which holds a shard's whole table as an Arrow stream: so Ray never splits or
joins shards. Packing writes the table once; nothing is copied to unpack it.
"""

import io

import numpy as np
import pyarrow as pa

from sdbatch.batch.metrics import Metrics
from sdbatch.stages.base import Stage, facts_of, shard_of, with_shard

_ROWS = "rows"
PIECE_BYTES = 8 * 2**20  # of a table, joined at a time to be written


def pack(rows: pa.Table) -> pa.Table:
    """Return a block of one row that holds a table, with its metadata."""
    sink = io.BytesIO()  # grows in place; Arrow's stream copies what it has when it grows
    piece = max(1, rows.num_rows * PIECE_BYTES // max(1, rows.nbytes))  # rows
    with pa.ipc.new_stream(sink, rows.schema) as stream:
        for start in range(0, rows.num_rows, piece):
            stream.write_table(rows.slice(start, piece).combine_chunks())
    stream_bytes = pa.py_buffer(sink.getvalue())
    offsets = pa.array([0, stream_bytes.size], pa.int64()).buffers()[1]
    column = pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, stream_bytes])
    return pa.table({_ROWS: column})


def unpack(block: pa.Table) -> pa.Table:
    """Return the table in a block; a block of the plan is its table."""
    if block.num_rows != 1:
        raise RuntimeError(f"a block of {block.num_rows} rows: a block holds exactly one shard")
    if _ROWS not in block.schema.names:
        return block
    column = block[_ROWS].chunk(0)
    _, offsets, data = column.buffers()
    start, stop = np.frombuffer(offsets, np.int64)[column.offset : column.offset + 2]
    return pa.ipc.open_stream(data.slice(start, stop - start)).read_all()  # a scalar would copy


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

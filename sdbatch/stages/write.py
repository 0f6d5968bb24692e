"""The last stage, on a CPU: a drawn shard to its files and the receipt that commits it."""

import itertools
from collections import Counter

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sdbatch import schema
from sdbatch.job import Output
from sdbatch.output import formats, names, receipts
from sdbatch.output.formats import parquet
from sdbatch.output.receipts import Writer
from sdbatch.stages.base import Needs, Stage, facts_of, shard_of


class WriteShard(Stage):
    """Writes data/NNNNNN, failed/NNNNNN if rows failed, and last receipts/NNNNNN.

    Raises StorageError if a file cannot be written: that ends the job, which can be resumed.
    """

    name = "write"
    kind = "sink"
    needs = Needs(columns=schema.OUTPUT_NAMES)

    def __init__(
        self, output: Output, writer: Writer, scores: pa.Schema = schema.NO_COLUMNS
    ) -> None:
        self._output = output
        self._writer = writer
        self._scores = scores

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Commit a shard; returns its receipt as one row of receipts.MANIFEST."""
        extras = schema.extras_of(rows.schema, self._scores)
        columns = schema.failed(extras, self._scores)
        ordered = rows.select(columns.names).replace_schema_metadata(None)
        failed = ordered.filter(pc.is_valid(ordered["error"]))
        drawn = (_drawn(ordered) if failed.num_rows else ordered).drop_columns(["error"])
        shard = shard_of(rows)
        files: dict[str, bytes | memoryview] = {}
        if drawn.num_rows:
            name = names.data_file(shard.shard, formats.suffix(self._output))
            files[name] = formats.write_shard(drawn, self._output)
        if failed.num_rows:
            sink = pa.BufferOutputStream()
            pq.write_table(parquet.with_features(failed), sink)
            files[names.failed_file(shard.shard)] = memoryview(sink.getvalue())
        reasons = dict(Counter(failed["error"].to_pylist()).most_common())
        receipt = self._writer.commit(shard, reasons, files, facts_of(rows))
        return receipts.to_table([receipt])


def _drawn(rows: pa.Table) -> pa.Table:
    """Return the rows without an error; no image is copied."""
    drawn = pc.is_null(rows["error"])
    chunks: list[pa.Array] = []
    start = 0
    for is_drawn, group in itertools.groupby(drawn.to_pylist()):
        stop = start + len(list(group))
        if is_drawn:
            chunks += rows["image"].slice(start, stop - start).chunks
        start = stop
    images = pa.chunked_array(chunks, schema.IMAGE.type)
    others = rows.drop_columns(["image"]).filter(drawn)
    return others.append_column(schema.IMAGE, images).select(rows.column_names)

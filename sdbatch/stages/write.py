"""Last stage, on a CPU: a drawn shard to its files and the receipt that commits it."""

import json
from collections import Counter

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sdbatch import schema
from sdbatch.batch.metrics import NOBODY, Monitor
from sdbatch.job import Output
from sdbatch.output import formats, receipts
from sdbatch.output.receipts import Receipt
from sdbatch.storage import Store


class WriteShard:
    """Writes data/NNNNNN, failed/NNNNNN where a row failed, and last receipts/NNNNNN.

    Raises StorageError if a file cannot be written: that ends the job, which can be resumed.
    """

    def __init__(self, output: Output, store: Store, monitor: Monitor = NOBODY) -> None:
        self._output = output
        self._store = store
        self._monitor = monitor

    def __call__(self, block: pa.Table) -> pa.Table:
        """Commit the shard in `block`; returns its receipt as one row of schema.MANIFEST."""
        shard, rows, facts = schema.unpack(block)
        with self._monitor.stage("write", shard):
            return receipts.to_table([self._commit(shard, rows, facts)])

    def _commit(self, shard: int, rows: pa.Table, facts: str) -> Receipt:
        undrawn = pc.is_valid(rows["error"])
        failed = rows.filter(undrawn)
        drawn = rows.filter(pc.invert(undrawn)) if failed.num_rows else rows
        drawn = drawn.drop_columns(["error"])
        name = schema.shard_name(shard)
        files = {}
        if drawn.num_rows:
            suffix, data = formats.write(drawn, self._output)
            files[f"{receipts.DATA}/{name}.{suffix}"] = data
        if failed.num_rows:
            sink = pa.BufferOutputStream()
            pq.write_table(failed, sink)
            files[f"{receipts.FAILED}/{name}.parquet"] = sink.getvalue().to_pybytes()
        reasons = dict(Counter(failed["error"].to_pylist()).most_common())
        receipt = Receipt(
            shard, drawn.num_rows, failed.num_rows, reasons, files=[], facts=json.loads(facts)
        )
        return receipts.commit(self._store, receipt, files)

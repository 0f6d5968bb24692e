"""First stage, on a CPU: a shard of the plan to its requests, one row an image."""

import pyarrow as pa

from sdbatch import schema
from sdbatch.batch.metrics import NOBODY, Monitor
from sdbatch.errors import PromptTableError
from sdbatch.job import Job
from sdbatch.prompts import readers, requests, table


class ReadPrompts:
    """Reads the rows of a shard from its file and resolves them.

    A row that cannot be drawn stays, with its `error`; rows keep the order of the table.
    """

    def __init__(
        self,
        job: Job,
        columns: dict[str, str],
        read: pa.Schema,
        extras: pa.Schema,
        monitor: Monitor = NOBODY,
    ) -> None:
        self._job = job
        self._columns = columns
        self._read = read
        self._extras = extras
        self._monitor = monitor

    def __call__(self, block: pa.Table) -> pa.Table:
        """Turn a block of one row of the plan, with the file's `url`, into its requests."""
        planned = block.to_pylist()[0]
        url = planned.pop("url")
        shard = schema.Shard(**planned)
        with self._monitor.stage("read", shard.shard):
            return schema.pack(shard.shard, self._rows(shard, url), "{}")

    def _rows(self, shard: schema.Shard, url: str) -> pa.Table:
        start, stop = shard.rows(self._job.prompts.images_per_row)
        if readers.checksum(url) != shard.checksum:
            raise PromptTableError(
                f"{url} = changed since the job was planned: must stay as it was."
            )
        source = table.Source(shard.source, url, stop, shard.checksum)
        rows = table.read(source, start, stop, self._read)
        return requests.resolve(rows, shard, self._job, self._columns, self._extras)

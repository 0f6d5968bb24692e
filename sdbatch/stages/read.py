"""The first stage, on a CPU: a shard of the plan to its requests, one row an image."""

import pyarrow as pa

from sdbatch.errors import PromptTableError
from sdbatch.job import Job
from sdbatch.prompts import files, requests, table
from sdbatch.prompts.table import Table
from sdbatch.schema import PLAN
from sdbatch.stages.base import Needs, Stage, shard_of, with_shard


class ReadPrompts(Stage):
    """Reads the rows of a shard from its file and resolves them.

    A row that cannot be drawn stays, with its `error`; rows keep the order of the table.
    """

    name = "read"
    kind = "source"
    needs = Needs(columns=(*PLAN.names, "url"))

    def __init__(self, job: Job, prompts: Table) -> None:
        self._job = job
        self._columns = prompts.columns
        self._schema = prompts.schema
        self._extras = prompts.extras

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Turn one row of the plan, with the file's `url`, into the shard's requests."""
        url = rows["url"][0].as_py()
        shard = shard_of(rows)
        start, stop = shard.rows(self._job.prompts.images_per_row)
        in_job, reader = self._job.prompts.rows, self._job.prompts.reader
        if in_job is None and files.checksum(url, reader) != shard.checksum:
            raise PromptTableError(
                f"{url} = changed since the job was planned: must not change during a run. Run "
                f"the same command again to see how to go on."
            )
        source = table.Source(shard.source, url, stop, shard.checksum)
        source_rows = table.read_rows(source, start, stop, self._schema, in_job, reader)
        resolved = requests.resolve_requests(
            source_rows, shard, self._job, self._columns, self._extras
        )
        return with_shard(resolved, shard)

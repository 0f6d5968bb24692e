"""The first stage, on a CPU: a shard of the plan to its requests, one row an image."""

import os
from typing import Any

import pyarrow as pa
from numpy.typing import NDArray

from sdbatch.errors import PromptTableError
from sdbatch.job import Job
from sdbatch.prompts import captions, files, requests, table
from sdbatch.prompts.pictures import Pictures, folder_of
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
        self._pictures = prompts.pictures
        self._extras = prompts.extras
        self._folder = ""
        if job.prompts.rows is not None and prompts.pictures.names:
            self._folder = os.getcwd()  # of the job; a task has another one

    @property
    def has_pictures(self) -> bool:
        """Tell whether rows may be drawn from pictures."""
        return bool(self._pictures.names)

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Turn one row of the plan, with the file's `url`, into the shard's requests."""
        url = rows["url"][0].as_py()
        shard = shard_of(rows)
        start, stop = shard.rows(self._job.prompts.row_images)
        in_job, reader = self._job.prompts.rows, self._job.prompts.reader
        if in_job is None and files.checksum(url, reader) != shard.checksum:
            raise PromptTableError(
                f"{url} = changed since the job was planned: must not change during a run. Run "
                f"the same command again to see how to go on."
            )
        source = table.Source(shard.source, url, stop, shard.checksum)
        source_rows = table.read_rows(source, start, stop, self._schema, in_job, reader)

        def add_pictures(resolved: list[dict[str, Any]], row_of: NDArray[Any]) -> None:
            first = captions.first_row(source_rows, start)
            span = first, first + source_rows.num_rows
            cells = table.iter_pictures(source, span, self._pictures, in_job, reader)
            folder = self._folder if in_job is not None else folder_of(url)
            sized = self._job.prompts.size_from_image
            Pictures(self._columns, folder, sized).add(resolved, row_of, cells)

        resolved = requests.resolve_requests(
            source_rows,
            shard,
            self._job,
            self._columns,
            self._extras,
            add_pictures if self.has_pictures else None,
        )
        return with_shard(resolved, shard)

"""`sdbatch plan`: what a run would draw, from table footers and receipts' names alone."""

from dataclasses import dataclass

from sdbatch.job import Job
from sdbatch.output import plan, receipts
from sdbatch.prompts.table import open_table
from sdbatch.storage import Store


@dataclass(frozen=True)
class Outline:
    """What a run would do."""

    rows: int
    files: int
    columns: dict[str, str]  # our name -> the table's
    kept: list[str]  # the table's own columns that travel into the output
    images: int
    images_per_row: int
    shards: int
    images_per_shard: int
    images_committed: int
    shards_committed: int
    output: str
    format: str

    def text(self) -> str:
        """Return the outline for people."""
        used = ", ".join(f"{a} = {b}" if a != b else a for a, b in self.columns.items())
        return "\n".join(
            [
                f"rows       {self.rows:,} in {self.files:,} files",
                f"columns    {used}; kept: {', '.join(self.kept) or 'none'}",
                f"images     {self.images:,}, {self.images_per_row} a row",
                f"shards     {self.shards:,} of up to {self.images_per_shard:,} images",
                f"committed  {self.images_committed:,} images, {self.shards_committed:,} shards",
                f"output     {self.output} ({self.format})",
            ]
        )


def outline(job: Job) -> Outline:
    """Plan `job` and look what its output holds; write nothing."""
    store = Store(job.output.path)
    begun = plan.read(store)
    planned = plan.make(job, open_table(job.prompts), begun)
    committed = receipts.committed(store) if begun else set()
    size = planned.job.output.images_per_shard
    return Outline(
        rows=planned.rows,
        files=len(planned.table.sources),
        columns=planned.table.columns,
        kept=planned.table.extras.names,
        images=planned.images,
        images_per_row=job.prompts.images_per_row,
        shards=len(planned.shards),
        images_per_shard=int(size),
        images_committed=sum(s.images for s in planned.shards if s.shard in committed),
        shards_committed=len(committed),
        output=store.url,
        format=f"{job.output.format}, {job.output.image_format}",
    )

"""`sdbatch plan`: what a run would draw, from table footers, the first rows, receipts, and the
headers of the model's files.

With `check`, from all rows.
"""

from dataclasses import dataclass
from pathlib import Path

from sdbatch import resolve
from sdbatch.job import Job
from sdbatch.models.distilled import find_distilled
from sdbatch.models.find_model import ModelFiles
from sdbatch.models.identify import EDITING
from sdbatch.output import identity, receipts
from sdbatch.output.plan import Plan, make_plan
from sdbatch.output.record import Record, read_record
from sdbatch.prompts.check import Check, check_rows, describe_table
from sdbatch.prompts.table import open_table
from sdbatch.stages.base import added_columns
from sdbatch.storage import Store


@dataclass(frozen=True)
class Outline:
    """What a run would draw, and what its output holds already."""

    rows: int
    files: int
    columns: dict[str, str]  # our name -> the table's
    kept: list[str]  # the table's own columns that are copied into the output
    images: int
    images_per_row: int
    shards: int
    images_per_shard: int
    memory: str  # that a shard may take
    model: str
    engine: str  # its lanes, and where their number is from
    images_committed: int
    shards_committed: int
    output: str
    format: str
    left: list[str]  # files of prompts.path that are not part of the table, "NAME: reason"
    notes: list[str]  # what a user should know of columns and rows
    check: Check

    def text(self) -> str:
        """Return the outline for people."""
        columns = ", ".join(f"{a} = {b}" if a != b else a for a, b in self.columns.items())
        return "\n".join(
            [
                f"rows       {self.rows:,} in {self.files:,} files",
                f"columns    {columns}",
                f"copied     {', '.join(self.kept) or 'none'}",
                f"images     {self.images:,}, {self.images_per_row} per row",
                f"shards     {self.shards:,}, up to {self.images_per_shard:,} images each",
                f"memory     {self.memory}",
                f"committed  {self.images_committed:,} images, {self.shards_committed:,} shards",
                f"model      {self.model}",
                f"engine     {self.engine}",
                f"output     {self.output} ({self.format})",
                *(f"left out   {each}" for each in self.left),
                *self.check.text(),
                *(f"note       {note}" for note in self.notes),
            ]
        )


def make_outline(job: Job, check: bool = False) -> Outline:
    """Plan `job` and compare the plan with its output; write nothing.

    Args:
        job: from load_job.
        check: resolve all rows of the table, and not only the first ones.

    Raises:
        SdbatchError: `run` could not begin.
    """
    store = Store(job.output.path)
    record = read_record(store)
    model, files, job = _find_model(job, record)
    table = open_table(job.prompts, added_columns(job).names)
    plan = make_plan(job, table, record)
    proof = record.proof() if record and record.shards is not None else None
    edits = files is not None and files.use == EDITING
    distilled = find_distilled(job.model, files)
    checked = check_rows(plan.job, plan.table, distilled, edits=edits, whole=check)
    committed = {receipt.shard for receipt in receipts.proved(store, proof)} if proof else set()
    return Outline(
        rows=plan.rows,
        files=len(plan.table.sources),
        columns=plan.table.columns,
        kept=plan.table.extras.names,
        images=plan.images,
        images_per_row=job.prompts.row_images,
        shards=len(plan.shards),
        images_per_shard=plan.images_per_shard,
        memory=". ".join(filter(None, [describe_memory(plan), memory_warning(plan)])),
        images_committed=sum(s.images for s in plan.shards if s.shard in committed),
        shards_committed=len(committed),
        model=model,
        engine="not known, as the model"
        if files is None
        else resolve.describe_lanes(plan.job, files),
        output=store.url,
        format=f"{job.output.format}, {job.output.image_format}",
        left=list(plan.table.left),
        notes=[*describe_table(plan.job, plan.table), *checked.notes()],
        check=checked,
    )


def _find_model(job: Job, record: Record | None) -> tuple[str, ModelFiles | None, Job]:
    """Return what a user should know of the model, its files, and the job with what they say.

    The files of a hub id, or of a path that another machine has, are not looked at: an existing
    output says what was found in them.

    Raises:
        ModelError: its files are wrong.
    """
    path = job.model.path
    if record is not None:
        job = identity.with_commits(job, record.job)
    if path.startswith("builtin:") or Path(path).exists():
        files, job = resolve.find_model(job)
        return f"{path}, for {files.use}" if files.use else path, files, job
    if record is not None and record.job.model.path == path:
        open_keys = [name for name in resolve.FOUND if getattr(job.model, name) is None]
        values = {name: getattr(record.job.model, name) for name in open_keys}
        job = job.updated(model=job.model.updated(**values))
    return f"{path}, not on this machine: not checked", None, job


def describe_memory(plan: Plan) -> str:
    """Return a bound on the memory of the process that draws or writes a shard."""
    mib = plan.shard_memory / 2**20
    size = f"{mib:,.0f} MiB" if mib < 1024 else f"{mib / 1024:,.1f} GiB"
    height, width = plan.largest
    images = f"{plan.most_images:,} images of {width}x{height}"
    pictures = " with their pictures" if "image" in plan.table.columns else ""
    return f"up to {size} for a shard, if it is {images} pixels of pure noise{pictures}"


def memory_warning(plan: Plan) -> str | None:
    """Return the way out if a shard may take more memory than one of automatic size."""
    if plan.most_images <= plan.fitting_images:
        return None
    return (
        f"Set output.images_per_shard to {plan.fitting_images} in a new output, or put the "
        f"largest images into a job of their own"
    )

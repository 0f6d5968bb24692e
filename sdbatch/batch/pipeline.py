"""The run: from a job to a dataset, with exact resume.

Read `run_job`, then `flow.lay_out`: the picture of ARCHITECTURE.md on one screen.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from sdbatch import resolve
from sdbatch.batch import flow, pool, ray_setup
from sdbatch.batch.driver import Driver
from sdbatch.batch.flow import ActorSetup
from sdbatch.batch.metrics import RayMetrics
from sdbatch.batch.pool import Machines
from sdbatch.errors import SdbatchError
from sdbatch.job import Job
from sdbatch.models import find_model as models
from sdbatch.models.find_model import ModelFiles
from sdbatch.output import identity, lifecycle, receipts
from sdbatch.output.plan import Plan, make_plan
from sdbatch.output.receipts import Receipt
from sdbatch.output.record import Record, read_record
from sdbatch.prompts.table import open_table
from sdbatch.report.closing import Report
from sdbatch.report.progress import Display, SilentDisplay
from sdbatch.resolve import MakeEngine, Resolved
from sdbatch.schema import Shard
from sdbatch.stages.base import added_columns
from sdbatch.storage import Store


def run_job(
    job: Job,
    *,
    address: str | None = None,
    overwrite: bool = False,
    retry_failed: bool = False,
    max_failed: int | None = None,
    display: Display | None = None,
) -> Report:
    """Draw every image of `job` that no receipt of its output proves yet.

    Args:
        job: from load_job.
        address: of a Ray cluster; else cluster.address, RAY_ADDRESS, or a Ray of this job's own.
        overwrite: remove what the output holds and start again.
        retry_failed: draw again the shards in which rows failed.
        max_failed: stop when more rows of the output than this have failed.
        display: where progress and the report are shown; default: nowhere.

    Returns:
        What the output holds now. `stopped` says why the run ended early; run again to go on.

    Raises:
        SdbatchError: the job could not start; nothing new was written.
    """
    ready = prepare(job, overwrite=overwrite, retry_failed=retry_failed)
    display = display or SilentDisplay()
    try:
        return draw(ready, address=address, max_failed=max_failed, display=display)
    except BaseException:
        display.close(None)  # or a live bar would keep the terminal
        raise


@dataclass(frozen=True)
class Ready:
    """A job that was checked as far as possible without starting anything."""

    plan: Plan
    record: Record | None  # of the output, if it exists
    model: ModelFiles
    store: Store
    valid: list[Receipt]  # of shards that are not drawn again
    redraw: list[Receipt]  # of shards to draw again: rows failed, or files are missing
    overwrite: bool

    @property
    def todo(self) -> list[Shard]:
        """Return the shards to draw."""
        valid = {receipt.shard for receipt in self.valid}
        return [shard for shard in self.plan.shards if shard.shard not in valid]


def prepare(job: Job, *, overwrite: bool = False, retry_failed: bool = False) -> Ready:
    """Find the table, the model and the state of the output; write nothing, start nothing."""
    store = Store(job.output.path)
    store.check_writable()
    lifecycle.check_output(store, job.prompts)
    record = None if overwrite else read_record(store)
    revision = job.model.revision
    if record is not None and record.job.model.path == job.model.path:
        revision = revision or record.job.model.revision
    model, job = resolve.find_model(job, revision)
    table = open_table(job.prompts, added_columns(job).names)
    planned = make_plan(job, table, record)
    committed = receipts.committed_shards(store) if record else set()
    existing = receipts.read_receipts(store, committed)
    complete = receipts.complete_shards(store, existing)
    again = {r.shard for r in existing if r.shard not in complete or (r.failed and retry_failed)}
    valid = [receipt for receipt in existing if receipt.shard not in again]
    redraw = [receipt for receipt in existing if receipt.shard in again]
    return Ready(planned, record, model, store, valid, redraw, overwrite)


def draw(
    ready: Ready,
    *,
    address: str | None = None,
    max_failed: int | None = None,
    display: Display,
    make_engine: MakeEngine | None = None,
) -> Report:
    """Draw the shards of `ready.todo`; `make_engine` makes another engine than the model's."""
    driver = Driver(ready.plan, ready.valid, ready.store, display, max_failed)
    if not ready.todo:
        return driver.finish(ready.plan.job)
    driver.show("starting Ray")
    job = ready.plan.job
    threads = ThreadPoolExecutor(1)  # hashes the weights while Ray starts
    hashed = threads.submit(models.sha256, ready.model)
    try:
        with threads, ray_setup.connected(address or job.cluster.address, job) as machines:
            driver.note("ray")
            resolved = _resolve(ready, machines, hashed.result())
            setup = _set_up_actors(ready, resolved, machines)
            lifecycle.begin(
                ready.store, ready.plan, resolved.job, ready.valid, ready.redraw, ready.overwrite
            )
            make_engine = make_engine or resolved.make_engine(ready.plan.table.columns)
            stages = flow.stages_of(resolved, ready.plan, ready.store, make_engine)
            driver.follow(flow.lay_out(ready.todo, ready.plan.urls(), stages, setup), setup)
            return driver.finish(resolved.job)
    except SdbatchError:  # it could not start: leave nothing behind
        if ready.record is None and not receipts.committed_shards(ready.store):
            lifecycle.remove(ready.store)
        raise


def _resolve(ready: Ready, machines: Machines, sha256: str | None) -> Resolved:
    """Resolve the planned job; reject it if it is not that of the existing output."""
    resolved = resolve.resolve(ready.plan.job, ready.model, machines.gpus, sha256)
    if ready.record is not None:
        identity.check_unchanged(resolved.job, ready.record.job, ready.record.versions)
    return resolved


def _set_up_actors(ready: Ready, resolved: Resolved, machines: Machines) -> ActorSetup:
    """Return the setup of the actors that will draw; none is started yet."""
    job, engine, shards = resolved.job, resolved.engine, len(ready.todo)
    actors = pool.fit(job.cluster, engine, machines, shards)
    images = sum(shard.images for shard in ready.todo)
    in_flight = pool.in_flight(actors.most, shards, images, engine.most_lanes)
    return ActorSetup(
        actors, in_flight, ray_setup.start_liveness(actors.most), RayMetrics(job.title)
    )

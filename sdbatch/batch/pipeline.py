"""The run: from a job to a dataset, with exact resume.

Read `run_job`, then `flow.lay_out`: the picture of ARCHITECTURE.md on one screen.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from sdbatch import resolve
from sdbatch.batch import flow, pool, ray_setup
from sdbatch.batch.driver import Driver
from sdbatch.batch.flow import ActorSetup
from sdbatch.batch.metrics import RayMetrics
from sdbatch.batch.pool import Machines
from sdbatch.errors import StorageError
from sdbatch.job import Job
from sdbatch.models import find_model as models
from sdbatch.models.distilled import find_distilled
from sdbatch.models.find_model import ModelFiles
from sdbatch.models.identify import EDITING
from sdbatch.output import identity, lease, lifecycle, names, receipts
from sdbatch.output.plan import Plan, make_plan
from sdbatch.output.progress import Progress
from sdbatch.output.receipts import Receipt, Writer
from sdbatch.output.record import Record, proof_of, read_record
from sdbatch.prompts.check import check_rows, describe_table
from sdbatch.prompts.table import open_table
from sdbatch.report.closing import Report
from sdbatch.report.outline import describe_memory, memory_warning
from sdbatch.report.progress import Display, SilentDisplay, SteadyDisplay
from sdbatch.resolve import MakeEngine, Resolved
from sdbatch.schema import Shard
from sdbatch.stages.base import Needs, added_columns
from sdbatch.storage import Store

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


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
        overwrite: replace what the output holds, as soon as an engine stands.
        retry_failed: draw again the shards in which rows failed.
        max_failed: stop when more rows of the output than this have failed.
        display: where progress and the report are shown; default: nowhere.

    Returns:
        What the output holds now. `stopped` says why the run ended early; run again to go on.

    Raises:
        SdbatchError: the job could not start; nothing was written or removed.
    """
    ready = prepare(job, overwrite=overwrite, retry_failed=retry_failed)
    display = SteadyDisplay(display) if display else SilentDisplay()
    try:
        return draw(ready, address=address, max_failed=max_failed, display=display)
    except BaseException:
        display.close(None)  # or a live bar would keep the terminal
        raise


@dataclass(frozen=True)
class Ready:
    """A job that was checked as far as possible without starting or writing anything."""

    plan: Plan
    record: Record | None  # of the output, if it exists
    model: ModelFiles
    store: Store
    overwrite: bool
    retry_failed: bool
    notes: tuple[str, ...]  # what a user should know of the table


def prepare(job: Job, *, overwrite: bool = False, retry_failed: bool = False) -> Ready:
    """Find the table and the model, and compare them with the output; write nothing."""
    store = Store(job.output.path)
    store.check_writable()
    lifecycle.check_output(store, job.prompts)
    record = None if overwrite else read_record(store)
    if record is not None:
        job = identity.with_commits(job, record.job)
    model, job = resolve.find_model(job)
    table = open_table(job.prompts, added_columns(job).names)
    plan = make_plan(job, table, record)
    distilled = find_distilled(job.model, model)
    check = check_rows(plan.job, plan.table, distilled, edits=model.use == EDITING)
    notes = (*describe_table(job, table), *check.notes())
    return Ready(plan, record, model, store, overwrite, retry_failed, notes)


@ray_setup.sigterm_as_interrupt()
def draw(
    ready: Ready,
    *,
    address: str | None = None,
    max_failed: int | None = None,
    display: Display,
    make_engine: MakeEngine | None = None,
) -> Report:
    """Draw the shards that are not proved; `make_engine` makes another engine than the model's."""
    job, images = ready.plan.job, ready.plan.images
    held = lease.take(ready.store, lambda step: display.show(Progress(images, 0, 0, 0.0, step)))
    driver = Driver(ready.plan, held, display, max_failed)
    try:
        work = find_work(ready)
        driver.keep(work.valid)
        if not work.todo:
            if ready.record is not None and ready.record.shards is None:  # plan.parquet is lost
                lifecycle.begin(ready.store, ready.plan, ready.record.job, work.again)
            return driver.finish(job)
        for note in ready.notes:
            _log.warning(f"Note: {note}")  # all of them: the terminal shows a message once a while
        warning = memory_warning(ready.plan)
        memory = f" (memory: {describe_memory(ready.plan)}. {warning})" if warning else ""
        driver.show(f"starting Ray{memory}")
        hashed = in_background(partial(models.sha256, ready.model))  # while Ray starts
        with ray_setup.connected(address or job.cluster.address, job) as machines:
            driver.note("ray")
            resolved = _resolve(ready, machines, hashed.result())
            job = resolved.job
            actor = pool.needs(job, resolved.engine, machines)
            if (cpus_note := pool.cpus_note(job, actor)) is not None:
                _log.warning(f"Note: {cpus_note}")
            setup = _set_up_actors(work.todo, resolved, actor, machines)
            make_engine = make_engine or resolved.make_engine(ready.plan.table.columns)
            writer = Writer(held, identity.fingerprint(resolved.job, identity.versions()))
            stages = flow.stages_of(job, ready.plan, writer, make_engine, actor)
            laid_out = flow.lay_out(work.todo, ready.plan.urls(), stages, setup)
            driver.follow(laid_out, setup, begin=partial(_begin, ready, resolved, work))
            return driver.finish(job)
    except KeyboardInterrupt:
        driver.stop("interrupted")
        return driver.finish(job)
    finally:
        driver.close()
        with suppress(StorageError):  # or it would hide what happened
            if ready.store.read_if_exists(names.JOB) is None:  # it could not start
                held.withdraw()


@dataclass(frozen=True)
class Work:
    """What an output has, and what is to do."""

    valid: list[Receipt]  # of shards that are not drawn again
    again: set[int]  # shards with a receipt that are drawn again
    todo: list[Shard]


def find_work(ready: Ready) -> Work:
    """Read the receipts of the output, which this run owns.

    Raises:
        StorageError: another run has changed the output since `prepare`.
    """
    record, shards = ready.record, ready.plan.shards
    if not ready.overwrite and read_record(ready.store) != record:
        raise StorageError(
            f"output.path = {ready.store.url}: changed by another run while this one began. Run "
            f"the same command again."
        )
    if record is None:
        return Work([], set(), list(shards))
    proof = proof_of(record.job, record.fingerprint, shards)
    valid = [
        receipt
        for receipt in receipts.proved(ready.store, proof)
        if not (ready.retry_failed and receipt.failed)
    ]
    numbers = {receipt.shard for receipt in valid}
    todo = [shard for shard in shards if shard.shard not in numbers]
    committed = receipts.committed_shards(ready.store)
    return Work(valid, {shard.shard for shard in todo} & committed, todo)


def _begin(ready: Ready, resolved: Resolved, work: Work) -> None:
    """Write to the output for the first time, as an engine stands."""
    if ready.overwrite:
        try:
            old = read_record(ready.store)
        except StorageError:  # damaged
            old = None
        lifecycle.remove(ready.store, old.proof() if old and old.shards is not None else None)
    lifecycle.begin(ready.store, ready.plan, resolved.job, work.again)


def _resolve(ready: Ready, machines: Machines, sha256: str | None) -> Resolved:
    """Resolve the planned job; reject it if it is not that of the existing output."""
    resolved = resolve.resolve(
        ready.plan.job, ready.model, machines.gpus, sha256, machines.gpu_types
    )
    _log.info(f"Engine: {resolved.lanes_by}.")
    if ready.record is not None:
        identity.check_unchanged(resolved.job, ready.record.job, ready.record.versions)
    return resolved


def _set_up_actors(
    todo: Sequence[Shard], resolved: Resolved, actor: Needs, machines: Machines
) -> ActorSetup:
    """Return the setup of the actors that will draw; none is started yet."""
    job, engine, shards = resolved.job, resolved.engine, len(todo)
    actors = pool.fit(job.cluster, actor, machines, shards)
    images = sum(shard.images for shard in todo)
    in_flight = pool.in_flight(actors.most, shards, images, engine.most_lanes)
    return ActorSetup(
        actors, in_flight, ray_setup.start_liveness(actors.most), RayMetrics(job.title)
    )


def in_background(work: Callable[[], _T]) -> "Future[_T]":
    """Do `work` in a thread that does not keep the process alive; return its future result."""
    future: Future[_T] = Future()

    def do() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001  raised again by who waits
            future.set_exception(error)

    threading.Thread(target=do, daemon=True).start()
    return future

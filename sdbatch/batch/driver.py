"""The driver's side of a run: collect receipts, show progress, stop when it must, finish."""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

from sdbatch.batch import ray_setup
from sdbatch.batch.flow import ActorSetup
from sdbatch.batch.liveness import Snapshot
from sdbatch.errors import ModelError, SdbatchError, one_line
from sdbatch.job import Growing, Job
from sdbatch.output import lifecycle, names, receipts
from sdbatch.output.plan import Plan
from sdbatch.output.receipts import Receipt
from sdbatch.report.card import dataset_card
from sdbatch.report.closing import Report
from sdbatch.report.gallery import gallery_page
from sdbatch.report.progress import Display, Heartbeat, Progress
from sdbatch.report.utilisation import measure_utilisation
from sdbatch.storage import Store

if TYPE_CHECKING:
    from ray.data import Dataset

POLL_SECONDS = 0.25
STALL_SECONDS = 1800.0  # without one tick, image or receipt anywhere
Arrived: TypeAlias = "queue.Queue[Receipt | BaseException | None]"


class Driver:
    """Follows one run. Memory grows with shards, not with images."""

    def __init__(
        self,
        plan: Plan,
        valid: Sequence[Receipt],
        store: Store,
        display: Display,
        max_failed: int | None,
    ) -> None:
        self._plan = plan
        self._valid = list(valid)
        self._drawn_before = sum(receipt.images for receipt in valid)
        self._failed_before = sum(receipt.failed for receipt in valid)
        self._new_receipts: list[Receipt] = []
        self._drawn_now = self._failed_now = 0  # images of the new receipts
        self._store = store
        self._display = display
        self._max_failed = max_failed
        self._heartbeat = Heartbeat(store)
        self._began = time.time()
        self._startup: dict[str, float] = {}
        self._snapshot = Snapshot(0, 0, 0, 0.0, 0.0, None)
        self._last_signs, self._moved = -1, time.monotonic()
        self._stopped: str | None = None

    def note(self, step: str, at: float | None = None) -> None:
        """Record when a step of the start was first done, in seconds from the run's beginning."""
        self._startup.setdefault(step, round((at or time.time()) - self._began, 2))

    def show(self, step: str = "") -> Progress:
        """Show the run's state; `step` says what the first image waits for."""
        drawn = self._drawn_now + self._snapshot.drawn
        failed = self._failed_now + self._snapshot.failed
        since = self._snapshot.loaded_at
        rate = (drawn + failed) / max(time.time() - since, 0.1) if since else 0.0
        progress = Progress(
            planned=self._plan.images,
            drawn=drawn + self._drawn_before,
            failed=failed + self._failed_before,
            images_per_s=round(rate, 2),
            step="" if drawn + failed else step,
        )
        self._display.show(progress)
        return progress

    def follow(self, flow: "Dataset", setup: ActorSetup) -> None:
        """Run `flow` and collect its receipts until it ends or the run must stop.

        Raises:
            SdbatchError: the run ended before it could draw anything.
        """
        from ray.exceptions import RayError

        arrived: Arrived = queue.Queue()
        threading.Thread(target=_stream, args=(flow, arrived), daemon=True).start()
        try:
            ended: BaseException | bool = False
            while not ended and self._stopped is None:
                new, ended = _take(arrived)
                self._new_receipts += new
                self._drawn_now += sum(receipt.images for receipt in new)
                self._failed_now += sum(receipt.failed for receipt in new)
                self._snapshot = setup.liveness.snapshot([receipt.shard for receipt in new])
                self._note_start()
                progress = self.show("loading the model")
                self._heartbeat.write_if_due(progress)
                setup.metrics.output(progress.planned, progress.done)
                if not ended:
                    self._stopped = self._reason_to_stop(progress)
            if isinstance(ended, BaseException):
                self._stopped = self._reason_of_end(ended)
        except KeyboardInterrupt:
            self._stopped = "interrupted"
        except RayError as error:  # the driver's own node is lost
            self._stopped = _ray_failed(error)
        finally:
            setup.liveness.close()  # so that the flow ends, also on a Ray that outlives the run
            self._snapshot = replace(self._snapshot, drawn=0, failed=0)  # not proved by receipts
        missing = {s.shard for s in self._plan.shards} - receipts.committed_shards(self._store)
        if missing and self._stopped is None:
            self._stopped = (
                f"{len(missing)} shards have no receipt at {self._store.url}, but Ray reported no "
                f"error: all nodes must write to the same place"
            )

    def finish(self, job: Job) -> Report:
        """End the output if it is complete; return the report and show it."""
        every = [*self._valid, *self._new_receipts]
        progress = self.show()
        report = Report(
            output=self._store.url,
            planned=progress.planned,
            images=progress.drawn,
            failed=progress.failed,
            reasons=receipts.count_reasons(every),
            drawn_now=self._drawn_now,
            seconds=round(time.time() - self._began, 2),
            images_per_s=progress.images_per_s,
            stopped=self._stopped,
            began=self._began,
            startup=self._startup,
            engines=measure_utilisation(self._new_receipts, self._drawing_seconds()),
        )
        if self._stopped is None:
            try:
                lifecycle.end(self._store, every, self._pages(job, every, report))
            except SdbatchError as error:
                report = replace(report, stopped=str(error))
        self._heartbeat.write("stopped" if report.stopped else "finished", progress)
        self._display.close(report)
        return report

    def _pages(
        self, job: Job, every: list[Receipt], report: Report
    ) -> dict[str, Callable[[], bytes]]:
        return {
            names.GALLERY: lambda: gallery_page(self._store, job, every),
            names.CARD: lambda: dataset_card(job, report).encode(),
        }

    def _drawing_seconds(self) -> float:
        since = self._snapshot.loaded_at
        return time.time() - since if since else 0.0

    def _note_start(self) -> None:
        for step, at in (("model", self._snapshot.loaded_at), ("image", self._snapshot.drawn_at)):
            if at:
                self.note(step, at)
        if self._new_receipts:
            self.note("shard")

    def _reason_to_stop(self, progress: Progress) -> str | None:
        signs = self._snapshot.signs + len(self._new_receipts)
        if signs != self._last_signs:
            self._last_signs, self._moved = signs, time.monotonic()
        if self._max_failed is not None and progress.failed > self._max_failed:
            return f"{progress.failed} rows failed, more than --max-failed {self._max_failed}"
        if time.monotonic() - self._moved > STALL_SECONDS and not self._waits_for_machines():
            return f"no progress for {STALL_SECONDS / 60:.0f} minutes: no tick, image or receipt"
        return None

    def _waits_for_machines(self) -> bool:
        """Tell whether the cluster grows and has no node that may draw yet."""
        cluster = self._plan.job.cluster
        if not isinstance(cluster.actors, Growing):
            return False
        nodes = ray_setup.machines(cluster.label_selector).nodes
        on_cpus = self._plan.job.engine.device == "cpu"
        return not any(node.draws and (on_cpus or node.gpus) for node in nodes)

    def _reason_of_end(self, error: BaseException) -> str:
        """Return the reason behind what Ray raised.

        Raises:
            SdbatchError: no engine could be loaded.
            BaseException: `error` itself, which is a bug.
        """
        from ray.exceptions import RayError, RayTaskError

        cause = _wrapped_error(error)
        if self._snapshot.rejected is not None:
            cause = ModelError(self._snapshot.rejected)
        if cause is None and isinstance(error, RayError) and not isinstance(error, RayTaskError):
            return _ray_failed(error)  # a node or the cluster is lost
        if cause is None:
            raise error
        if isinstance(cause, ModelError) and not self._new_receipts:
            raise cause from error
        return str(cause)


def _ray_failed(error: Exception) -> str:
    return f"Ray failed: {one_line(error, 300)}"


def _stream(flow: "Dataset", arrived: Arrived) -> None:
    try:
        for block in ray_setup.blocks_of(flow):
            for receipt in receipts.from_table(block):
                arrived.put(receipt)
        arrived.put(None)
    except BaseException as error:  # noqa: BLE001  raised again by the main thread
        arrived.put(error)


def _take(arrived: Arrived) -> tuple[list[Receipt], BaseException | bool]:
    """Wait a moment; return the receipts that arrived, and whether or why the flow ended."""
    new: list[Receipt] = []
    wait = POLL_SECONDS
    while True:
        try:
            one = arrived.get(timeout=wait)
        except queue.Empty:
            return new, False
        if one is None:
            return new, True
        if not isinstance(one, Receipt):
            return new, one
        new.append(one)
        wait = 0.001


def _wrapped_error(error: BaseException | None) -> SdbatchError | None:
    """Return the SdbatchError that Ray has wrapped, if there is one."""
    while error is not None:
        inner = getattr(error, "cause", None)  # a RayTaskError is of its cause's class too
        if isinstance(error, SdbatchError) and inner is None:
            return error
        error = inner if isinstance(inner, BaseException) else error.__cause__
    return None

"""The driver's side of a run: take in the receipts, show progress, stop when it must, end it."""

import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

from sdbatch.batch import ray_setup
from sdbatch.batch.liveness import RemoteWatch, Snapshot
from sdbatch.batch.metrics import Monitor
from sdbatch.errors import ModelError, SdbatchError
from sdbatch.job import Growing, Job
from sdbatch.output import lifecycle, receipts
from sdbatch.output.plan import Plan
from sdbatch.output.receipts import Receipt
from sdbatch.report import utilisation
from sdbatch.report.closing import Report
from sdbatch.report.progress import Display, Heartbeat, Progress
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
        kept: Sequence[Receipt],
        store: Store,
        display: Display,
        max_failed: int | None,
    ) -> None:
        self._plan = plan
        self._kept = list(kept)
        self._drawn_before = sum(receipt.images for receipt in kept)
        self._failed_before = sum(receipt.failed for receipt in kept)
        self._came: list[Receipt] = []
        self._drawn_now = self._failed_now = 0  # of those that came: counted as they come
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
        """Remember when a step of the start was done first, in seconds from the run's beginning."""
        self._startup.setdefault(step, round((at or time.time()) - self._began, 2))

    def show(self, step: str = "") -> Progress:
        """Show the run's state; `step` says what it waits for before the first image."""
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

    def follow(self, flow: "Dataset", watch: RemoteWatch, monitor: Monitor) -> None:
        """Run `flow` and take in its receipts until it ends or the run must stop.

        Raises:
            SdbatchError: the run ended before it could draw anything.
        """
        from ray.exceptions import RayError

        arrived: Arrived = queue.Queue()
        threading.Thread(target=_stream, args=(flow, arrived), daemon=True).start()
        try:
            ended: BaseException | bool = False
            while not ended and self._stopped is None:
                came, ended = _take(arrived)
                self._came += came
                self._drawn_now += sum(receipt.images for receipt in came)
                self._failed_now += sum(receipt.failed for receipt in came)
                self._snapshot = watch.snapshot([receipt.shard for receipt in came])
                self._note_start()
                progress = self.show("loading the model")
                self._heartbeat.show(progress)
                monitor.output(progress.planned, progress.done)
                if not ended:
                    self._stopped = self._why_stop(progress)
            if isinstance(ended, BaseException):
                self._stopped = self._why_ended(ended)
        except KeyboardInterrupt:
            self._stopped = "interrupted"
        except RayError as error:  # the watch is gone, and so is its node
            self._stopped = f"Ray = {' '.join(str(error).split())[:300]}"
        finally:
            watch.close()  # a flow that has not ended ends, also on a Ray that outlives the run
            self._snapshot = replace(self._snapshot, drawn=0, failed=0)  # not proved by receipts
        missing = {s.shard for s in self._plan.shards} - receipts.committed(self._store)
        if missing and self._stopped is None:
            self._stopped = (
                f"{len(missing)} shards have no receipt at {self._store.url}, though Ray reported "
                f"no error: all nodes must write to the same place"
            )

    def finish(self, job: Job) -> Report:
        """End the output if it is complete; return the report and show it."""
        every = [*self._kept, *self._came]
        progress = self.show()
        report = Report(
            output=self._store.url,
            planned=progress.planned,
            images=progress.drawn,
            failed=progress.failed,
            reasons=receipts.reasons(every),
            drawn_now=self._drawn_now,
            seconds=round(time.time() - self._began, 2),
            images_per_s=progress.images_per_s,
            stopped=self._stopped,
            began=self._began,
            startup=self._startup,
            engines=utilisation.of(self._came, self._drawing_seconds()),
        )
        if self._stopped is None:
            try:
                lifecycle.end(self._store, job, every, report)
            except SdbatchError as error:
                report = replace(report, stopped=str(error))
        self._heartbeat.write("stopped" if report.stopped else "finished", progress)
        self._display.close(report)
        return report

    def _drawing_seconds(self) -> float:
        since = self._snapshot.loaded_at
        return time.time() - since if since else 0.0

    def _note_start(self) -> None:
        for step, at in (("model", self._snapshot.loaded_at), ("image", self._snapshot.drawn_at)):
            if at:
                self.note(step, at)
        if self._came:
            self.note("shard")

    def _why_stop(self, progress: Progress) -> str | None:
        signs = self._snapshot.signs + len(self._came)
        if signs != self._last_signs:
            self._last_signs, self._moved = signs, time.monotonic()
        if self._max_failed is not None and progress.failed > self._max_failed:
            return f"{progress.failed} rows failed, more than --max-failed {self._max_failed}"
        if time.monotonic() - self._moved > STALL_SECONDS and not self._waits_for_machines():
            return f"nothing moved for {STALL_SECONDS / 60:.0f} minutes: no tick, image or receipt"
        return None

    def _waits_for_machines(self) -> bool:
        """Tell whether the cluster is to grow and holds no actor now: machines may come any day."""
        asked = self._plan.job.cluster
        if not isinstance(asked.actors, Growing):
            return False
        there = ray_setup.machines(asked.label_selector).nodes
        on_cpus = self._plan.job.engine.device == "cpu"
        return not any(node.draws and (on_cpus or node.gpus) for node in there)

    def _why_ended(self, error: BaseException) -> str:
        """Return the reason behind what Ray raised; raise a bug, or what kept all from starting."""
        from ray.exceptions import RayError, RayTaskError

        cause = _ours(error)
        if self._snapshot.refused is not None:
            cause = ModelError(self._snapshot.refused)
        if cause is None and isinstance(error, RayError) and not isinstance(error, RayTaskError):
            return f"Ray = {' '.join(str(error).split())[:300]}"  # a node or the cluster is gone
        if cause is None:
            raise error  # a bug of ours
        if isinstance(cause, ModelError) and not self._came:
            raise cause from error
        return str(cause)


def _stream(flow: "Dataset", arrived: Arrived) -> None:
    try:
        for block in ray_setup.blocks_of(flow):
            for receipt in receipts.from_table(block):
                arrived.put(receipt)
        arrived.put(None)
    except BaseException as error:  # noqa: BLE001  raised again by the main thread
        arrived.put(error)


def _take(arrived: Arrived) -> tuple[list[Receipt], BaseException | bool]:
    """Wait a moment for what arrives; return the receipts, and whether or why the flow ended."""
    came: list[Receipt] = []
    wait = POLL_SECONDS
    while True:
        try:
            one = arrived.get(timeout=wait)
        except queue.Empty:
            return came, False
        if one is None:
            return came, True
        if not isinstance(one, Receipt):
            return came, one
        came.append(one)
        wait = 0.001


def _ours(error: BaseException | None) -> SdbatchError | None:
    """Return the error of ours that Ray has wrapped, if there is one."""
    while error is not None:
        inner = getattr(error, "cause", None)  # a RayTaskError is of its cause's class too
        if isinstance(error, SdbatchError) and inner is None:
            return error
        error = inner if isinstance(inner, BaseException) else error.__cause__
    return None

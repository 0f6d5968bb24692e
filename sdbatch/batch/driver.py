"""The driver's side of a run: collect receipts, show progress, stop when it must, finish."""

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

from sdbatch.batch import ray_setup
from sdbatch.batch.flow import ActorSetup
from sdbatch.batch.liveness import Liveness
from sdbatch.batch.stall import Stall
from sdbatch.errors import ModelError, SdbatchError, StorageError, one_line
from sdbatch.job import Job
from sdbatch.output import identity, lifecycle, names, receipts
from sdbatch.output.devices import count_devices
from sdbatch.output.lease import Lease
from sdbatch.output.plan import Plan
from sdbatch.output.progress import Progress
from sdbatch.output.pulse import Pulse
from sdbatch.output.receipts import Proof, Receipt
from sdbatch.output.record import proof_of
from sdbatch.report.card import dataset_card
from sdbatch.report.closing import Report
from sdbatch.report.gallery import gallery_page
from sdbatch.report.progress import Display
from sdbatch.report.utilisation import measure_utilisation

if TYPE_CHECKING:
    from ray.data import Dataset

POLL_SECONDS = 0.25
FIRST_POLL_SECONDS = 0.05  # until an engine stands
_log = logging.getLogger(__name__)
Arrived: TypeAlias = "queue.Queue[Receipt | BaseException | None]"


class Driver:
    """Follows one run. Memory grows with shards, not with images."""

    def __init__(self, plan: Plan, lease: Lease, display: Display, max_failed: int | None) -> None:
        self._plan = plan
        self._lease = lease
        self._store = lease.store
        self._pulse = Pulse(lease)
        self._display = display
        self._max_failed = max_failed
        self._valid: list[Receipt] = []
        self._devices: set[str] = set()  # that drew the output, each noted if it is another one
        self._new_receipts: list[Receipt] = []
        self._drawn = self._failed = 0  # images of all these receipts
        self._before = 0  # images of the valid ones
        self._began = time.time()
        self._startup: dict[str, float] = {}
        self._snapshot = Liveness(0).snapshot([])
        self._stall = Stall(plan.job)
        self._stopped: str | None = None
        self._report: Report | None = None

    def keep(self, valid: Sequence[Receipt]) -> None:
        """Note the receipts of shards that are not drawn again."""
        self._valid = list(valid)
        self._devices = set(count_devices(valid))
        self._count(valid)
        self._before = self._drawn + self._failed

    def note(self, step: str, at: float | None = None) -> None:
        """Record when a step of the start was first done, in seconds from the run's beginning."""
        self._startup.setdefault(step, round((at or time.time()) - self._began, 2))

    def stop(self, reason: str) -> None:
        """End the run early; the first reason counts."""
        self._stopped = self._stopped or reason

    def show(self, step: str = "") -> Progress:
        """Show the run's state; `step` says what the first image waits for."""
        drawn, failed = self._drawn + self._snapshot.drawn, self._failed + self._snapshot.failed
        now = drawn + failed - self._before
        since = self._snapshot.loaded_at
        rate = now / max(time.time() - since, 0.1) if since else 0.0
        progress = Progress(
            planned=self._plan.images,
            drawn=drawn,
            failed=failed,
            images_per_s=round(rate, 2),
            step="" if now else step,
        )
        self._display.show(progress)
        self._pulse.update(progress)
        return progress

    def follow(self, flow: "Dataset", setup: ActorSetup, begin: Callable[[], None]) -> None:
        """Run `flow` and collect its receipts until it ends or the run must stop.

        Args:
            flow: from flow.lay_out.
            setup: of its actors, which draw nothing until the output is ready.
            begin: makes the output ready; called as soon as an engine stands.

        Raises:
            SdbatchError: the run ended before it could draw anything.
        """
        from ray.exceptions import RayError

        arrived: Arrived = queue.Queue()
        threading.Thread(target=_stream, args=(flow, arrived), daemon=True).start()
        begun = False
        try:
            ended: BaseException | bool = False
            while not ended and self._stopped is None:
                new, ended = _take(arrived, POLL_SECONDS if begun else FIRST_POLL_SECONDS)
                self._new_receipts += new
                self._count(new)
                self._note_devices(new)
                self._look(setup, new)
                if self._snapshot.loaded_at and not self._snapshot.open:
                    if not begun:
                        begin()
                    setup.liveness.open()  # again, if its actor was restarted
                    begun = True
                progress = self.show("loading the model")
                setup.metrics.output(progress.planned, progress.done)
                if not ended:
                    self._stopped = self._reason_to_stop(progress, setup)
            if isinstance(ended, BaseException):
                self._stopped = self._reason_of_end(ended)
        except KeyboardInterrupt:
            self.stop("interrupted")
        except RayError as error:  # the driver's own node is lost
            self.stop(_ray_failed(error))
        finally:
            setup.liveness.close()  # so that the flow ends, also on a Ray that outlives the run
            self._snapshot = replace(self._snapshot, drawn=0, failed=0)  # not proved by receipts

    def finish(self, job: Job) -> Report:
        """End the output if it is complete; return the report and show it, once."""
        if self._report is not None:  # Ctrl-C came after it
            return self._report
        if self._stopped is not None:
            self.show()
            self._pulse.end("stopped")  # first, or a shard is committed after it was counted
        try:
            proof = proof_of(job, identity.fingerprint(job, identity.versions()), self._plan.shards)
            every = self._proved(proof)
        except StorageError as error:
            self.stop(one_line(error))
            every = [*self._valid, *self._new_receipts]
        now = [receipt for receipt in every if receipt.run == self._lease.run.id]
        self._drawn = self._failed = 0
        self._count(every)
        progress = self.show()
        report = Report(
            output=self._store.url,
            planned=progress.planned,
            images=progress.drawn,
            failed=progress.failed,
            reasons=receipts.count_reasons(every),
            drawn_now=sum(receipt.images for receipt in now),
            seconds=round(time.time() - self._began, 2),
            images_per_s=progress.images_per_s,
            stopped=self._stopped,
            began=self._began,
            startup=self._startup,
            engines=measure_utilisation(now, self._drawing_seconds()),
            devices=count_devices(every),
            from_pictures=sum(receipt.facts.get("from_pictures", 0) for receipt in every),
        )
        if self._stopped is None:
            try:
                self._lease.check()
                lifecycle.end(self._store, proof, every, self._pages(job, every, report))
            except StorageError as error:
                report = replace(report, stopped=one_line(error))
        self._pulse.end("stopped" if report.stopped else "finished")
        self._report = report
        self._display.close(report)
        return report

    def close(self) -> None:
        """Give the output back, however the run ends."""
        self._pulse.end("stopped")

    def _proved(self, proof: Proof) -> list[Receipt]:
        """Return the receipts of the output, as its store has them now.

        All are read again when the run has ended by itself: what another wrote meanwhile does not
        count. A run that is stopped reads only new ones.
        """
        if self._stopped is None and self._new_receipts:
            every = receipts.proved(self._store, proof)
            missing = len(proof.shards) - len(every)
            if missing:
                self.stop(
                    f"{missing} of {len(proof.shards)} shards have no receipt that proves them at "
                    f"{self._store.url}, but Ray reported no error: all nodes must write to the "
                    f"same place, and nothing else"
                )
            return every
        every = [*self._valid, *self._new_receipts]
        if self._stopped is None:
            return every
        unseen = receipts.committed_shards(self._store) - {receipt.shard for receipt in every}
        found = receipts.read_receipts(self._store, proof, unseen).values()
        return [*every, *(each for each in found if isinstance(each, Receipt))]

    def _count(self, receipts: Sequence[Receipt]) -> None:
        self._drawn += sum(receipt.images for receipt in receipts)
        self._failed += sum(receipt.failed for receipt in receipts)

    def _note_devices(self, new: Sequence[Receipt]) -> None:
        """Say at once if another kind of device draws than drew what the output holds already."""
        others = set(count_devices(new)) - self._devices if self._devices else set()
        for device in sorted(others):
            _log.warning(
                f"Note: this run draws with {device}, and what the output holds was drawn by "
                f"{' and '.join(sorted(self._devices))}. The bits of a row may differ between "
                f"them. For one kind throughout, choose machines with cluster.label_selector, or "
                f"start again with --overwrite."
            )
        self._devices |= others

    def _look(self, setup: ActorSetup, new: list[Receipt]) -> None:
        """Take a snapshot; what was seen once stays, though the actor that saw it may have died."""
        before = self._snapshot
        now = setup.liveness.snapshot([receipt.shard for receipt in new])
        self._snapshot = replace(
            now,
            loaded_at=before.loaded_at or now.loaded_at,
            drawn_at=before.drawn_at or now.drawn_at,
        )
        for step, at in (("model", now.loaded_at), ("image", now.drawn_at)):
            if at:
                self.note(step, at)
        if self._new_receipts:
            self.note("shard")

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

    def _reason_to_stop(self, progress: Progress, setup: ActorSetup) -> str | None:
        if self._pulse.lost is not None:
            return self._pulse.lost.removesuffix(".")
        if self._max_failed is not None and progress.failed > self._max_failed:
            return f"{progress.failed} rows failed, more than --max-failed {self._max_failed}"
        receipts = len(self._new_receipts)
        return self._stall.reason(self._snapshot, receipts, setup.liveness.living_nodes)

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
        if not self._snapshot.drawn_at and not self._new_receipts:
            raise cause or error
        if cause is None:  # a bug
            return f"{type(error).__name__}: {one_line(error, 300)}"
        return one_line(cause)


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


def _take(arrived: Arrived, wait: float) -> tuple[list[Receipt], BaseException | bool]:
    """Wait so many seconds; return the receipts that arrived, and whether or why the flow ended."""
    new: list[Receipt] = []
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
            return type(error)(str(error).partition("\n")[0])  # Ray appends lines of advice
        error = inner if isinstance(inner, BaseException) else error.__cause__
    return None

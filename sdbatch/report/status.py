"""`sdbatch status`: the state of an output, read from any machine that can open it."""

import time
from dataclasses import dataclass

from sdbatch.errors import StorageError
from sdbatch.output import lease, names, receipts
from sdbatch.output.devices import count_devices, several_devices
from sdbatch.output.lease import Run
from sdbatch.output.progress import Heartbeat, Progress, read_heartbeat
from sdbatch.output.receipts import Receipt
from sdbatch.output.record import require_record
from sdbatch.report.progress import Display, format_duration
from sdbatch.storage import Store

WATCH_SECONDS = 1.0  # between two reads of the heartbeat
MISSED_HEARTBEATS = 5  # after so many the run counts as gone
MAX_REASONS = 10


@dataclass(frozen=True)
class Status:
    """The state of an output at a moment. Its counts are of shards that are proved."""

    output: str
    state: str  # finished, running, stopped (by its own driver), gone (without a word)
    planned: int
    images: int
    failed: int
    shards: int
    shards_committed: int
    reasons: dict[str, int]  # why rows failed -> number of rows, most frequent first
    run: Run | None  # the last one; None: its file is missing
    progress: Progress | None  # of the last run, with shards that are not committed yet
    devices: dict[str, int]  # kind of device -> images drawn by it

    @property
    def exit_code(self) -> int:
        """Return 0 if no row has failed yet, 3 if some have, 1 if the run ended early."""
        if self.state in ("stopped", "gone"):
            return 1
        return 3 if self.failed else 0

    def text(self) -> str:
        """Return the status for people."""
        lines = [
            f"{self.output}: {self.state}",
            f"  {self.images + self.failed:,} of {self.planned:,} images committed, "
            f"{self.failed:,} failed, {self.shards_committed:,} of {self.shards:,} shards",
        ]
        if self.run is not None and self.state != "finished":
            lines.append(f"  {self.run.describe()}")
        if self.state == "running" and self.progress is not None:
            lines.append(_progress_line(self.progress))
        several = several_devices(self.devices)
        lines += [f"  {several}"] if several else []
        reasons = list(self.reasons.items())[:MAX_REASONS]
        lines += [f"  {count:,} failed: {reason}" for reason, count in reasons]
        return "\n".join(lines)


def read_status(store: Store) -> Status:
    """Return the state of the output. On another machine's run it waits for a heartbeat.

    Raises:
        StorageError: there is no output, or its job.yaml or plan.parquet is damaged.
    """
    run = lease.newest_run(store)
    if run is not None and run.ended is None and store.read_if_exists(names.JOB) is None:
        raise StorageError(
            f"{store.url} = no {names.JOB} yet: {run.describe()} writes it when its first engine "
            f"is ready. Try again in a moment."
        )
    record = require_record(store)
    heartbeat = read_heartbeat(store)
    state = _run_state(store, run, heartbeat)
    found = receipts.read_receipts(store, record.proof()).values()
    committed = [receipt for receipt in found if isinstance(receipt, Receipt)]
    shards = record.planned()
    if len(committed) == len(shards) and state != "running":
        state = "finished"
    return Status(
        output=store.url,
        state=state,
        planned=sum(shard.images for shard in shards),
        images=sum(receipt.images for receipt in committed),
        failed=sum(receipt.failed for receipt in committed),
        shards=len(shards),
        shards_committed=len(committed),
        reasons=receipts.count_reasons(committed),
        run=run,
        progress=heartbeat.progress if heartbeat and run and heartbeat.run == run.id else None,
        devices=count_devices(committed),
    )


def watch_run(store: Store, display: Display) -> Status:
    """Show the run's progress until it ends; return the state of the output after that.

    While the run goes on, only its heartbeat is read, not the receipts.

    Raises:
        StorageError: there is no output, or a file of it is damaged.
    """
    status = read_status(store)
    while status.state == "running":
        last, seen = None, time.monotonic()
        while time.monotonic() - seen < MISSED_HEARTBEATS * (last.every if last else WATCH_SECONDS):
            heartbeat = read_heartbeat(store)
            if heartbeat is None or heartbeat.state != "running":
                break
            if heartbeat != last:
                last, seen = heartbeat, time.monotonic()
                display.show(heartbeat.progress)
            time.sleep(WATCH_SECONDS)
        status = read_status(store)
    display.close(None)
    return status


def _progress_line(progress: Progress) -> str:
    """Return the progress of a run that goes on, with shards that are not committed yet."""
    seconds = progress.eta_seconds
    eta = "" if seconds is None else f", ETA {format_duration(seconds)}"
    return (
        f"  {progress.done:,} images including shards in flight, "
        f"{progress.images_per_s:.1f} images/s{eta}"
    )


def _run_state(store: Store, run: Run | None, heartbeat: Heartbeat | None) -> str:
    """Return the state of the last run, on an output that is not complete."""
    if run is None:
        return "gone"
    says_so = heartbeat is not None and heartbeat.run == run.id and heartbeat.state != "running"
    if run.ended is not None or says_so:
        return "stopped"
    every = heartbeat.every if heartbeat is not None else WATCH_SECONDS
    return "running" if lease.is_alive(store, run, MISSED_HEARTBEATS * every) else "gone"

"""`sdbatch status`: the state of an output, read from any machine that can open it."""

import time
from dataclasses import dataclass
from typing import Any

from sdbatch.output import receipts
from sdbatch.output.record import require_record
from sdbatch.report.progress import Display, Progress, format_duration, read_progress
from sdbatch.storage import Store

WATCH_SECONDS = 1.0  # between two reads of the heartbeat
MAX_MISSED_HEARTBEATS = 5  # more of them: the run counts as gone
MAX_REASONS = 10


@dataclass(frozen=True)
class Status:
    """The state of an output at a moment. Its counts are of shards with a receipt."""

    output: str
    state: str  # finished, running, stopped (by its own driver), gone (the heartbeat ended)
    planned: int
    images: int
    failed: int
    shards: int
    shards_committed: int
    reasons: dict[str, int]  # why rows failed -> number of rows, most frequent first
    heartbeat: dict[str, Any] | None  # progress.json

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
        if self.state == "running" and self.heartbeat is not None:
            lines.append(_heartbeat_line(self.heartbeat))
        reasons = list(self.reasons.items())[:MAX_REASONS]
        lines += [f"  {count:,} failed: {reason}" for reason, count in reasons]
        return "\n".join(lines)


def read_status(store: Store) -> Status:
    """Return the state of the output.

    Raises:
        StorageError: there is no output, or a file of it is damaged.
    """
    record = require_record(store)
    committed = receipts.read_receipts(store, receipts.committed_shards(store))
    heartbeat = read_progress(store)
    complete = len(committed) == len(record.shards)
    return Status(
        output=store.url,
        state="finished" if complete and _has_ended(heartbeat) else _run_state(heartbeat),
        planned=sum(shard.images for shard in record.shards),
        images=sum(receipt.images for receipt in committed),
        failed=sum(receipt.failed for receipt in committed),
        shards=len(record.shards),
        shards_committed=len(committed),
        reasons=receipts.count_reasons(committed),
        heartbeat=heartbeat,
    )


def watch_run(store: Store, display: Display) -> Status:
    """Show the run's progress until it ends; return the state of the output after that.

    While the run goes on, only its heartbeat is read, not the receipts.

    Raises:
        StorageError: there is no output, or a file of it is damaged.
    """
    status = read_status(store)
    while status.state == "running":
        heartbeat = read_progress(store)
        if heartbeat is None or _run_state(heartbeat) != "running":
            status = read_status(store)
        else:
            display.show(Progress.from_dict(heartbeat))
            time.sleep(WATCH_SECONDS)
    display.close(None)
    return status


def _heartbeat_line(heartbeat: dict[str, Any]) -> str:
    """Return the progress of a run that goes on, with shards that are not committed yet."""
    seconds = heartbeat["eta_seconds"]
    eta = "" if seconds is None else f", ETA {format_duration(seconds)}"
    age = max(0, time.time() - heartbeat["updated"])
    return (
        f"  {heartbeat['drawn'] + heartbeat['failed']:,} images including shards in flight, "
        f"{heartbeat['images_per_s']:.1f} images/s{eta} ({age:.0f} s ago)"
    )


def _has_ended(heartbeat: dict[str, Any] | None) -> bool:
    return heartbeat is None or heartbeat["state"] != "running"


def _run_state(heartbeat: dict[str, Any] | None) -> str:
    """Return the state of the last run, by its heartbeat, on an output that is not complete."""
    if heartbeat is None:
        return "gone"
    age = time.time() - heartbeat["updated"]
    if heartbeat["state"] == "running" and age > MAX_MISSED_HEARTBEATS * heartbeat["every"]:
        return "gone"
    return "stopped" if heartbeat["state"] == "finished" else str(heartbeat["state"])

"""`sdbatch status`: how far an output is, from any machine that can read it."""

import time
from dataclasses import dataclass
from typing import Any

from sdbatch.errors import StorageError
from sdbatch.output import plan, receipts
from sdbatch.report import progress
from sdbatch.report.progress import Display, duration
from sdbatch.storage import Store

WATCH_SECONDS = 1.0
SILENT_BEATS = 5  # heartbeats missed before a run counts as gone


@dataclass(frozen=True)
class Status:
    """An output at a moment. `committed` counts are proved by receipts."""

    output: str
    state: str  # finished, running, stopped (cleanly), gone (its driver fell silent)
    planned: int
    images: int
    failed: int
    shards: int
    shards_committed: int
    reasons: dict[str, int]
    heartbeat: dict[str, Any] | None  # progress.json

    @property
    def exit_code(self) -> int:
        """Return 0 if all is drawn or being drawn, 3 if rows failed, 1 if the run ended early."""
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
            beat = self.heartbeat
            eta = beat["eta_seconds"]
            left = "" if eta is None else f", ETA {duration(eta)}"
            age = max(0, time.time() - beat["updated"])
            lines.append(
                f"  {beat['drawn'] + beat['failed']:,} images with those in flight, "
                f"{beat['images_per_s']:.1f} images/s{left} ({age:.0f} s ago)"
            )
        lines += [
            f"  {count:,} failed: {reason}" for reason, count in list(self.reasons.items())[:10]
        ]
        return "\n".join(lines)


def status(store: Store) -> Status:
    """Read how far the output is.

    Raises:
        StorageError: there is no output.
    """
    begun = plan.read(store)
    if begun is None:
        raise StorageError(f"{store.url} = no {plan.JOB_FILE}: must be the output of a job.")
    found = receipts.read_all(store, receipts.committed(store))
    beat = progress.read(store)
    complete = len(found) == len(begun.shards)
    return Status(
        output=store.url,
        state="finished" if complete and _is_over(beat) else _state(beat),
        planned=sum(shard.images for shard in begun.shards),
        images=sum(receipt.images for receipt in found),
        failed=sum(receipt.failed for receipt in found),
        shards=len(begun.shards),
        shards_committed=len(found),
        reasons=receipts.reasons(found),
        heartbeat=beat,
    )


def watch(store: Store, display: Display) -> Status:
    """Show the run's progress until it is over; return how the output is then.

    Of a run at work only its heartbeat is read, not the receipts.

    Raises:
        StorageError: there is no output.
    """
    found = status(store)
    while found.state == "running":
        beat = progress.read(store)
        if beat is None or _state(beat) != "running":
            found = status(store)
        else:
            display.show(progress.from_json(beat))
            time.sleep(WATCH_SECONDS)
    display.close(None)
    return found


def _is_over(beat: dict[str, Any] | None) -> bool:
    return beat is None or beat["state"] != "running"


def _state(beat: dict[str, Any] | None) -> str:
    if beat is None:
        return "gone"
    if beat["state"] == "running" and time.time() - beat["updated"] > SILENT_BEATS * beat["every"]:
        return "gone"
    return "stopped" if beat["state"] == "finished" else str(beat["state"])

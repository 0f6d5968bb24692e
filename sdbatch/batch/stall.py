"""Tells when a run stands still, so that it ends instead of waiting without end."""

import time
from collections.abc import Callable, Set

from sdbatch.batch import ray_setup
from sdbatch.batch.liveness import Snapshot
from sdbatch.job import Growing, Job

STALL_SECONDS = 1800.0  # without one tick, image or receipt anywhere: a first tick may compile
SILENT_SECONDS = 300.0  # without a message, of which a drawing actor sends two a second


class Stall:
    """Follows the signs of life of one run."""

    def __init__(self, job: Job, clock: Callable[[], float] = time.monotonic) -> None:
        self._job = job
        self._clock = clock
        self._signs = self._messages = -1
        self._moved = self._heard = clock()

    def reason(
        self, snapshot: Snapshot, receipts: int, living_nodes: Callable[[], Set[str]]
    ) -> str | None:
        """Return why the run is to end, as nothing moves; None if it goes on.

        Args:
            snapshot: of now.
            receipts: how many the run has written.
            living_nodes: returns the nodes of the cluster that stay.
        """
        now = self._clock()
        if snapshot.signs + receipts != self._signs:
            self._signs, self._moved = snapshot.signs + receipts, now
        if snapshot.messages != self._messages or snapshot.loading or not snapshot.drawing:
            self._messages, self._heard = snapshot.messages, now
        # The actor of a node that is gone waits for another node, and may do so for longer.
        if now - self._heard > SILENT_SECONDS and living_nodes() & set(snapshot.drawing.values()):
            return (
                f"no sign of life from any drawing actor for {SILENT_SECONDS / 60:.0f} minutes, "
                f"though {len(snapshot.drawing)} shards are being drawn: the processes hang, or "
                f"something has suspended them"
            )
        if now - self._moved > STALL_SECONDS and not self._waits_for_machines():
            return f"no progress for {STALL_SECONDS / 60:.0f} minutes: no tick, image or receipt"
        return None

    def _waits_for_machines(self) -> bool:
        """Tell whether the cluster grows and has no node that may draw yet."""
        cluster = self._job.cluster
        if not isinstance(cluster.actors, Growing):
            return False
        nodes = ray_setup.machines(cluster.label_selector).nodes
        on_cpus = self._job.engine.device == "cpu"
        return not any(node.draws and (on_cpus or node.gpus) for node in nodes)

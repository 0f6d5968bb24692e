"""What a run does, as it does it: images of the shards in flight, signs of life, deaths.

One Watch lives in a Ray actor of the run; the drawing actors report to it and the driver polls
it. It outlives the drawing actors, so it is here that a shard's deaths are counted.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sdbatch.batch.metrics import Monitor, Work
from sdbatch.errors import ModelError

MOST_LOADS = 3  # actors that may die in a row while they load the model
ANSWER_SECONDS = 300.0
ENDED = "run = stopped: the shards in flight are given up."


@dataclass(frozen=True)
class Snapshot:
    """A run at a moment."""

    drawn: int  # images of shards that have no receipt yet
    failed: int
    signs: int  # grows with every sign of life
    loaded_at: float  # clock seconds of the first engine that was ready; 0: none yet
    drawn_at: float  # clock seconds of the first image that was reported; 0: none yet
    refused: str | None  # why the engine cannot be loaded


class Watch:
    """The state; plain and synchronous. Ray runs its methods one at a time."""

    def __init__(self, actors: int) -> None:
        self._actors = actors
        self._loads = 0  # begun since the last one that ended
        self._open: dict[int, int] = {}  # shard -> times begun and not ended
        self._beats: dict[int, tuple[int, int]] = {}  # shard -> drawn, failed
        self._ticks: dict[int, int] = {}  # shard -> ticks at its last beat
        self._committed: set[int] = set()
        self._closed = False
        self._signs = 0
        self._loaded_at = self._drawn_at = 0.0
        self._refused: str | None = None

    def loading(self) -> None:
        """An actor begins to load its engine.

        Raises:
            ModelError: too many died of that, or the run has ended.
        """
        if self._closed:
            raise ModelError(ENDED)
        self._loads += 1
        self._signs += 1
        if self._loads > self._actors + MOST_LOADS:
            self._refused = (
                f"model = loading it killed {MOST_LOADS} actors or more: it must fit into memory. "
                f"Set fewer cluster.actors or a smaller engine.dtype."
            )
            raise ModelError(self._refused)

    def loaded(self) -> None:
        """An actor's engine is ready."""
        self._loads = 0
        self._signs += 1
        self._loaded_at = self._loaded_at or time.time()

    def refused(self, reason: str) -> None:
        """An actor's engine cannot be loaded, and will not be on another try."""
        self._refused = reason

    def deaths(self, shard: int) -> int:
        """Return how often drawing of `shard` began and never ended."""
        return self._open.get(shard, 0)

    def begin(self, shard: int) -> None:
        """Drawing of `shard` begins."""
        self._open[shard] = self._open.get(shard, 0) + 1
        self._beats.pop(shard, None)  # of an attempt that died
        self._signs += 1

    def beat(self, shard: int, drawn: int, failed: int, ticks: int) -> bool:
        """So many images of `shard` are drawn or failed by now, after so many ticks in all.

        Returns:
            Whether the run goes on; else drawing must end.
        """
        if (drawn, failed) != self._beats.get(shard) or ticks != self._ticks.get(shard):
            self._signs += 1
        self._beats[shard], self._ticks[shard] = (drawn, failed), ticks
        if drawn:
            self._drawn_at = self._drawn_at or time.time()
        return not self._closed

    def end(self, shard: int, drawn: int, failed: int) -> None:
        """Drawing of `shard` ended; its receipt is to come."""
        self._open.pop(shard, None)
        self._ticks.pop(shard, None)
        if shard not in self._committed:  # else this message was overtaken by the receipt
            self._beats[shard] = (drawn, failed)
        self._signs += 1

    def close(self) -> None:
        """End the run: shards in flight are given up, no more actors load."""
        self._closed = True

    def snapshot(self, committed: Iterable[int]) -> Snapshot:
        """Return the run's state; forgets the shards `committed` since the last call."""
        for shard in committed:
            self._committed.add(shard)
            self._beats.pop(shard, None)
        drawn = sum(beat[0] for beat in self._beats.values())
        failed = sum(beat[1] for beat in self._beats.values())
        return Snapshot(drawn, failed, self._signs, self._loaded_at, self._drawn_at, self._refused)


class RemoteWatch:
    """The Watch of a run as its drawing actors and its driver call it; tells the monitor, too."""

    def __init__(self, handle: Any, monitor: Monitor) -> None:
        self._handle = handle
        self._monitor = monitor
        self._drawing: dict[int, tuple[int, int, int]] = {}  # shard -> images, drawn, failed

    def loading(self) -> None:
        """See Watch.loading."""
        import ray

        ray.get(self._handle.loading.remote())

    def loaded(self) -> None:
        """See Watch.loaded."""
        self._handle.loaded.remote()

    def refused(self, reason: str) -> None:
        """See Watch.refused."""
        import ray

        ray.get(self._handle.refused.remote(reason))

    async def deaths(self, shard: int) -> int:
        """See Watch.deaths."""
        return int(await self._handle.deaths.remote(shard))

    async def begin(self, shard: int, images: int) -> None:
        """See Watch.begin; waits until it is noted, as what follows may kill this process."""
        await self._handle.begin.remote(shard)
        self._drawing[shard] = (images, 0, 0)

    async def beat(self, shard: int, drawn: int, failed: int, work: Work) -> bool:
        """See Watch.beat."""
        images, drawn_before, failed_before = self._drawing[shard]
        self._monitor.images(drawn - drawn_before, failed - failed_before)
        self._drawing[shard] = (images, drawn, failed)
        queue = sum(images - drawn - failed for images, drawn, failed in self._drawing.values())
        self._monitor.engine(work, queue)
        return bool(await self._handle.beat.remote(shard, drawn, failed, work.ticks))

    async def end(self, shard: int, drawn: int, failed: int) -> None:
        """See Watch.end."""
        del self._drawing[shard]
        self._handle.end.remote(shard, drawn, failed)

    def close(self) -> None:
        """See Watch.close."""
        self._handle.close.remote()

    def snapshot(self, committed: list[int]) -> Snapshot:
        """See Watch.snapshot; waits ANSWER_SECONDS at most."""
        import ray

        found: Snapshot = ray.get(self._handle.snapshot.remote(committed), timeout=ANSWER_SECONDS)
        return found

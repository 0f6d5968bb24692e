"""Signs of life of a run: progress of the shards in flight, deaths of actors.

The state lives in a Ray actor of the run. The drawing actors report to it and the driver polls it.
It outlives the drawing actors, so it can count the deaths during a shard.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sdbatch.errors import ModelError

MOST_LOADS = 3  # actors that may die in a row while they load the model
ANSWER_SECONDS = 300.0


@dataclass(frozen=True)
class Snapshot:
    """A run at a moment."""

    drawn: int  # images of shards that have no receipt yet
    failed: int
    signs: int  # grows with every sign of life
    loaded_at: float  # clock seconds of the first engine that was ready; 0: none yet
    drawn_at: float  # clock seconds of the first image that was reported; 0: none yet
    rejected: str | None  # why the engine cannot be loaded


class Liveness:
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
        self._rejected: str | None = None

    def loading(self) -> None:
        """Note that an actor begins to load its engine.

        Raises:
            ModelError: too many actors died while loading, or the run has ended.
        """
        if self._closed:
            raise ModelError("The run has stopped, so no actor is started.")
        self._loads += 1
        self._signs += 1
        if self._loads > self._actors + MOST_LOADS:
            self._rejected = (
                f"Loading the model killed {MOST_LOADS} actors or more: it must fit into memory. "
                f"Set fewer cluster.actors or a smaller engine.dtype."
            )
            raise ModelError(self._rejected)

    def loaded(self) -> None:
        """Note that an actor's engine is ready."""
        self._loads = 0
        self._signs += 1
        self._loaded_at = self._loaded_at or time.time()

    def rejected(self, reason: str) -> None:
        """Note that the engine cannot be loaded by any actor."""
        self._rejected = reason

    def deaths(self, shard: int) -> int:
        """Return how often drawing of `shard` began and did not end."""
        return self._open.get(shard, 0)

    def begin(self, shard: int) -> None:
        """Note that drawing of `shard` begins."""
        self._open[shard] = self._open.get(shard, 0) + 1
        self._beats.pop(shard, None)  # of an attempt that died
        self._signs += 1

    def beat(self, shard: int, drawn: int, failed: int, ticks: int) -> bool:
        """Note the images of `shard` that are drawn and failed, and the ticks of its engine.

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
        """Note that drawing of `shard` ended; its receipt follows."""
        self._open.pop(shard, None)
        self._ticks.pop(shard, None)
        if shard not in self._committed:  # else the receipt has overtaken this message
            self._beats[shard] = (drawn, failed)
        self._signs += 1

    def close(self) -> None:
        """End the run: the shards in flight are not finished, and no more actors load."""
        self._closed = True

    def snapshot(self, committed: Iterable[int]) -> Snapshot:
        """Return the run's state; forget the shards `committed` since the last call."""
        for shard in committed:
            self._committed.add(shard)
            self._beats.pop(shard, None)
        drawn = sum(beat[0] for beat in self._beats.values())
        failed = sum(beat[1] for beat in self._beats.values())
        return Snapshot(drawn, failed, self._signs, self._loaded_at, self._drawn_at, self._rejected)


class LivenessClient:
    """A run's Liveness as its drawing actors and its driver call it; each method is Liveness's."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle  # of the Ray actor

    def loading(self) -> None:
        self._wait(self._call("loading"))

    def loaded(self) -> None:
        self._call("loaded")

    def rejected(self, reason: str) -> None:
        self._wait(self._call("rejected", reason))

    async def deaths(self, shard: int) -> int:
        return int(await self._call("deaths", shard))

    async def begin(self, shard: int) -> None:
        """See Liveness.begin; waits for it, as drawing may kill this process."""
        await self._call("begin", shard)

    async def beat(self, shard: int, drawn: int, failed: int, ticks: int) -> bool:
        return bool(await self._call("beat", shard, drawn, failed, ticks))

    async def end(self, shard: int, drawn: int, failed: int) -> None:
        self._call("end", shard, drawn, failed)

    def close(self) -> None:
        self._call("close")

    def snapshot(self, committed: list[int]) -> Snapshot:
        """See Liveness.snapshot; waits at most ANSWER_SECONDS."""
        snapshot: Snapshot = self._wait(self._call("snapshot", committed), ANSWER_SECONDS)
        return snapshot

    def _call(self, method: str, *arguments: Any) -> Any:
        """Send a call; return an awaitable reference to its result."""
        return getattr(self._handle, method).remote(*arguments)

    def _wait(self, result: Any, seconds: float | None = None) -> Any:
        import ray

        return ray.get(result, timeout=seconds)

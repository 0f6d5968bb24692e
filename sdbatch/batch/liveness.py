"""Signs of life of a run: progress of the shards in flight, deaths of actors.

The state lives in a Ray actor of the run. The drawing actors report to it and the driver polls it.
It outlives the drawing actors, so it can count the deaths during a shard.
"""

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sdbatch.errors import ModelError

MOST_LOADS = 3  # actors that may die in a row while they load the model
ANSWER_SECONDS = 300.0
OPEN_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Snapshot:
    """A run at a moment."""

    drawn: int  # images of shards that have no receipt yet
    failed: int
    signs: int  # grows with every sign of life
    loaded_at: float  # clock seconds of the first engine that was ready; 0: none yet
    drawn_at: float  # clock seconds of the first image that was reported; 0: none yet
    rejected: str | None  # why the engine cannot be loaded
    open: bool  # drawing may begin
    loading: bool  # an actor loads its engine, and none was ready since it began
    drawing: dict[int, str]  # the shards that are being drawn, and the node of each
    messages: int  # grows with every message of a drawing actor


class Liveness:
    """The state; plain and synchronous. Ray runs its methods one at a time."""

    def __init__(self, actors: int) -> None:
        self._actors = actors
        self._loads = 0  # begun since the last one that ended
        self._open: dict[int, list[str]] = {}  # shard -> nodes on which it began and did not end
        self._beats: dict[int, tuple[int, int]] = {}  # shard -> drawn, failed
        self._ticks: dict[int, int] = {}  # shard -> ticks at its last beat
        self._committed: set[int] = set()
        self._may_draw = self._closed = False
        self._signs = self._messages = 0
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

    def open(self) -> None:
        """Let drawing begin: the output is ready."""
        self._may_draw = True

    def may_draw(self) -> bool:
        """Tell whether drawing may begin.

        Raises:
            ModelError: the run has ended.
        """
        if self._closed:
            raise ModelError("The run has stopped, so this shard is not drawn.")
        return self._may_draw

    def deaths(self, shard: int) -> list[str]:
        """Return the node of each actor that began to draw `shard` and did not end."""
        return list(self._open.get(shard, ()))

    def begin(self, shard: int, node: str) -> int:
        """Note that drawing of `shard` begins on `node`; return which attempt it is, from 1."""
        attempts = self._open.setdefault(shard, [])
        attempts.append(node)
        self._messages += 1
        self._beats.pop(shard, None)  # of an attempt that died
        self._signs += 1
        return len(attempts)

    def beat(self, shard: int, drawn: int, failed: int, ticks: int) -> bool:
        """Note the images of `shard` that are drawn and failed, and the ticks of its engine.

        Returns:
            Whether the run goes on; else drawing must end.
        """
        self._messages += 1
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
        self._messages += 1
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
        return Snapshot(
            drawn,
            failed,
            self._signs,
            self._loaded_at,
            self._drawn_at,
            self._rejected,
            self._may_draw,
            self._loads > 0,
            {shard: attempts[-1] for shard, attempts in self._open.items()},
            self._messages,
        )


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

    async def wait_until_open(self) -> None:
        """Wait until drawing may begin."""
        while not await self._call("may_draw"):
            await asyncio.sleep(OPEN_POLL_SECONDS)

    def open(self) -> None:
        self._call("open")

    async def deaths(self, shard: int) -> int:
        """Return how many actors died while they drew `shard`, on nodes that stay.

        The end of a node ends all its actors, so it explains their deaths.
        """
        nodes = await self._call("deaths", shard)
        living = self.living_nodes() if nodes else ()
        return sum(node in living for node in nodes)

    async def begin(self, shard: int) -> int:
        """See Liveness.begin; waits for it, as drawing may kill this process."""
        return int(await self._call("begin", shard, self._node()))

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

    def living_nodes(self) -> set[str]:
        """Return the nodes of the cluster that stay: alive, and not drained to be reclaimed."""
        import ray
        from ray._private.state import state

        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        return alive - set(state.get_draining_nodes())

    def _node(self) -> str:
        """Return the node of this process."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def _call(self, method: str, *arguments: Any) -> Any:
        """Send a call; return an awaitable reference to its result."""
        return getattr(self._handle, method).remote(*arguments)

    def _wait(self, result: Any, seconds: float | None = None) -> Any:
        import ray

        return ray.get(result, timeout=seconds)

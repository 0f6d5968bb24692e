"""Whose turn it is: the shapes of requests share the device by time.

The shape with work whose calls have taken the least device time goes next, call by call, whether
they denoise, encode or decode. A shape that begins to have work starts where the others are, so
that idle time is not saved up (start-time fair queueing; Goyal, Vin and Cheng 1996). So a request
waits for one call of each other shape at most, before each share of its own.
"""

import time
from collections.abc import Callable, Hashable

from sdbatch.engine.clock import Account
from sdbatch.engine.lanes import Lanes

MAX_IDLE_SHAPES = 64  # kept without requests; making one takes no time
PATIENCE_SECONDS = 30.0  # for which a shape that would leave rows empty gives way to full ones


class Turns:
    """The lanes of all shapes. Belongs to the engine's thread."""

    def __init__(self) -> None:
        self.shapes: dict[Hashable, Lanes] = {}
        self._candidates: list[Lanes] = []
        self._now = 0.0  # the time on the account that went last

    @property
    def busy(self) -> bool:
        """Tell whether a request waits for lanes or is in them."""
        return any(lanes.busy for lanes in self.shapes.values())

    @property
    def waiting(self) -> int:
        """Return how many requests wait for lanes."""
        return sum(lanes.waiting for lanes in self.shapes.values())

    def lanes_for(self, shape: Hashable, make_lanes: Callable[[], Lanes]) -> Lanes:
        """Return the lanes of a shape, for a request that is about to wait for them."""
        if shape not in self.shapes:
            self._evict_idle_shapes()
            self.shapes[shape] = make_lanes()
        lanes = self.shapes[shape] = self.shapes.pop(shape)  # to the end: the last one used
        if not lanes.busy:
            lanes.account.seconds = max(lanes.account.seconds, self._now)
        return lanes

    def choose_candidates(self) -> None:
        """Find the shapes that may have the next turn.

        Where rows would be empty, a shape gives way to full ones, but not for longer than
        PATIENCE_SECONDS; after that it has its share until it is full or idle. Requests come late
        to a shape whose pictures are encoded or drawn before.
        """
        for lanes in self.shapes.values():
            lanes.account.drawing = lanes.busy
            if not lanes.busy or lanes.fills_rows:
                lanes.gave_way_at = None
        busy = [lanes for lanes in self.shapes.values() if lanes.busy]
        full = [lanes for lanes in busy if lanes.fills_rows or self._is_impatient(lanes)]
        self._candidates = full or busy
        for lanes in busy:
            if lanes in self._candidates:
                continue
            lanes.gave_way_at = lanes.gave_way_at or time.perf_counter()
            lanes.account.seconds = max(lanes.account.seconds, self._now)

    def is_due(self, account: Account) -> bool:
        """Tell whether a call for this account may go before the next turn."""
        return all(account.seconds <= lanes.account.seconds for lanes in self._candidates)

    def next(self) -> Lanes | None:
        """Return the lanes that tick next; None if there is no work."""
        if not self._candidates:
            return None
        lanes = min(self._candidates, key=lambda each: each.account.seconds)
        self._now = max(self._now, lanes.account.seconds)
        return lanes

    def _is_impatient(self, lanes: Lanes) -> bool:
        if lanes.gave_way_at is None:
            return False
        return time.perf_counter() - lanes.gave_way_at >= PATIENCE_SECONDS

    def _evict_idle_shapes(self) -> None:
        """Evict the idle shapes above MAX_IDLE_SHAPES that were used least recently.

        Clients of a service may ask for any size.
        """
        idle = [shape for shape, lanes in self.shapes.items() if not lanes.busy]
        for shape in idle[: max(0, len(idle) - MAX_IDLE_SHAPES)]:
            self.shapes.pop(shape).account.drawing = False

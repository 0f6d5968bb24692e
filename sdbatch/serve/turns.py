"""Whose image is drawn next: the keys take turns, and a key's own images keep their order.

Only as many images as the replicas can use are drawn at a time. If all were sent to the replicas
at once, they would be drawn in the order of their arrival: a hundred images of one key before the
only image of another.
"""

import asyncio
import sys
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from sdbatch.serve.metrics import Metrics


@dataclass(eq=False, frozen=True)
class _Ticket:
    """One image that waits for its turn or is being drawn."""

    key: str
    reservation: int  # its number
    turn: "asyncio.Future[None]"  # done when it is the image's turn


class Turns:
    """The images that wait, and those that are being drawn. Belongs to one event loop."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._places = sys.maxsize
        self._waiting: OrderedDict[str, deque[_Ticket]] = (
            OrderedDict()
        )  # by key; the next one first
        self._drawing: dict[_Ticket, None] = {}  # in the order of their start

    def set_places(self, places: int) -> None:
        """Set how many images are drawn at a time; the next ones start at once if it grows."""
        self._places = places
        self._start_next()

    @asynccontextmanager
    async def turn(self, key: str, reservation: int, deadline: float) -> AsyncIterator[None]:
        """Wait for the turn of an image, which lasts as long as the context.

        Args:
            key: the name of its API key.
            reservation: the number of its reservation.
            deadline: by the event loop's clock.

        Raises:
            TimeoutError: it was not its turn before the deadline.
        """
        ticket = _Ticket(key, reservation, asyncio.get_running_loop().create_future())
        self._waiting.setdefault(key, deque()).append(ticket)
        self._show(key)
        self._start_next()
        try:
            async with asyncio.timeout_at(deadline):
                await ticket.turn
            yield
        finally:
            self._leave(ticket)

    def count_before(self, key: str, reservation: int) -> int:
        """Return how many images are before the next one of a reservation."""
        for place, ticket in enumerate(self._drawing):
            if ticket.reservation == reservation:
                return place
        line = self._waiting.get(key, deque())
        numbers = [ticket.reservation for ticket in line]
        rounds = numbers.index(reservation) if reservation in numbers else len(numbers)
        before, earlier = len(self._drawing) + rounds, True  # earlier in the round than this key
        for other, tickets in self._waiting.items():
            if other == key:
                earlier = False
            else:
                before += min(len(tickets), rounds + earlier)
        return before

    def _start_next(self) -> None:
        """Start as many images as there are places, one of each key in turn."""
        while self._waiting and len(self._drawing) < self._places:
            key, line = next(iter(self._waiting.items()))
            ticket = line.popleft()
            if line:
                self._waiting.move_to_end(key)
            else:
                del self._waiting[key]
            self._drawing[ticket] = None
            if not ticket.turn.done():  # else it is cancelled, and leaves in a moment
                ticket.turn.set_result(None)
            self._show(key)

    def _leave(self, ticket: _Ticket) -> None:
        """Remove an image that is drawn, or does not wait any longer."""
        if ticket in self._drawing:
            del self._drawing[ticket]
        else:
            line = self._waiting[ticket.key]
            line.remove(ticket)
            if not line:
                del self._waiting[ticket.key]
        self._show(ticket.key)
        self._start_next()

    def _show(self, key: str) -> None:
        """Set the gauges of a key."""
        drawing = sum(ticket.key == key for ticket in self._drawing)
        self._metrics.waiting.labels(key).set(len(self._waiting.get(key, ())))
        self._metrics.drawing.labels(key).set(drawing)

"""From a request's pictures to latents: encoding in fixed groups, before it waits for lanes.

The engine's thread encodes, as it owns the device. A group always has the same number of pictures,
padded, so that a picture's latents do not depend on the others.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from numpy.typing import NDArray

from sdbatch.engine.clock import Account, DeviceClock
from sdbatch.engine.cohort import Ticket
from sdbatch.engine.family import Family
from sdbatch.engine.faults import FaultPolicy, is_lack_of_memory
from sdbatch.engine.lanes import padded
from sdbatch.engine.limits import CallSizes

MOST_PASSED = 32  # groups of other sizes that go first


@dataclass(slots=True)
class _Picture:
    ticket: Ticket
    name: str
    pixels: NDArray[Any]  # (H, W, 3), 0 to 255


@dataclass(slots=True)
class _Waiting:
    """Pictures of one size that wait for a full group."""

    size: tuple[int, int]  # height, width
    group: int
    pictures: deque[_Picture] = field(default_factory=deque)
    passed: int = 0  # groups of other sizes that were encoded meanwhile

    @property
    def full(self) -> bool:
        """Tell whether there is a full group."""
        return len(self.pictures) >= self.group

    @property
    def overdue(self) -> bool:
        """Tell whether it has waited for so long that its group need not be full."""
        return self.passed > MOST_PASSED


class Encoder:
    """Encodes the pictures of requests. Belongs to the engine's thread.

    Args:
        family: encodes.
        faults: handles what an encoder call raises.
        clock: charges the accounts of the requests with the encoder calls.
        sizes: how many pictures a call has: always the same number, padded.
        ready: is called with a request whose pictures are encoded.
    """

    def __init__(
        self,
        family: Family,
        faults: FaultPolicy,
        clock: DeviceClock,
        sizes: CallSizes,
        ready: Callable[[Ticket], None],
    ) -> None:
        self._family = family
        self._faults = faults
        self._clock = clock
        self._call_sizes = sizes
        self._ready = ready
        self._sizes: dict[tuple[int, int], _Waiting] = {}
        self._groups: dict[tuple[int, int], int] = {}  # after a lack of memory
        self._encoded: dict[Ticket, dict[str, torch.Tensor]] = {}

    @property
    def busy(self) -> bool:
        """Tell whether pictures wait to be encoded."""
        return bool(self._encoded)

    def add(self, ticket: Ticket) -> None:
        """Queue the pictures of a request's reading."""
        self._encoded[ticket] = {}
        size = (ticket.request.height, ticket.request.width)
        group = self._groups.get(size, self._call_sizes.group_of(*size))
        waiting = self._sizes.setdefault(size, _Waiting(size, group))
        for name, pixels in ticket.reading.pictures.items():
            waiting.pictures.append(_Picture(ticket, name, pixels))

    def encode(self, is_due: Callable[[Account], bool]) -> bool:
        """Encode a group: a full one if there is one, unless a size has waited for long.

        Args:
            is_due: tells whether a call for an account may be made now.

        Returns:
            Whether there was a group for which it may.
        """
        for key, size in list(self._sizes.items()):
            self._drop_ended(size)
            if not size.pictures:
                del self._sizes[key]
        sizes = [each for each in self._sizes.values() if is_due(each.pictures[0].ticket.account)]
        if not sizes:
            return False
        size = max(sizes, key=lambda each: (each.overdue, each.full))
        for each in self._sizes.values():
            each.passed += 1
        size.passed = 0
        count = min(size.group, len(size.pictures))
        self._encode([size.pictures.popleft() for _ in range(count)], size)
        return True

    def _drop_ended(self, size: _Waiting) -> None:
        """Drop the pictures of requests that were cancelled or have failed."""
        for ticket in [each.ticket for each in size.pictures]:
            if ticket.future.done():
                self._encoded.pop(ticket, None)
        size.pictures = deque(each for each in size.pictures if each.ticket in self._encoded)

    def _encode(self, group: list[_Picture], size: _Waiting) -> None:
        with self._clock.charge([picture.ticket.account for picture in group]):
            latents = self._faults.decode(partial(self._call, group, size.group))
        if isinstance(latents, torch.Tensor):
            for picture, encoded in zip(group, latents, strict=False):
                self._receive(picture, encoded)
        elif is_lack_of_memory(latents) and size.group > 1:
            size.pictures.extendleft(reversed(group))
            size.group //= 2
            self._groups[size.size] = size.group
            self._faults.record(f"{size.group} pictures an encoder call", latents)
        elif len(group) > 1:  # one of them may be the cause
            for picture in group:
                self._encode([picture], size)
        else:
            self._fail(group[0].ticket, latents)

    def _call(self, group: list[_Picture], count: int) -> torch.Tensor:
        pixels = torch.stack([torch.tensor(each.pixels) for each in group])
        return self._family.encode(padded(pixels, count))

    def _receive(self, picture: _Picture, encoded: torch.Tensor) -> None:
        """Keep an encoded picture; when all of its request's are there, the request is ready."""
        ticket = picture.ticket
        parts = self._encoded.get(ticket)
        if parts is None:  # it has failed
            return
        parts[picture.name] = encoded
        if len(parts) < len(ticket.reading.pictures):
            return
        del self._encoded[ticket]
        try:
            ticket.reading = self._family.with_pictures(ticket.request, ticket.reading, parts)
            ticket.original = ticket.reading.original
        except Exception as error:  # noqa: BLE001  caused by these pictures
            ticket.settle(error)
            return
        self._ready(ticket)

    def _fail(self, ticket: Ticket, error: Exception) -> None:
        self._encoded.pop(ticket, None)
        ticket.settle(error)

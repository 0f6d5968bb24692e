"""The device time of calls, on the accounts of those who made them; measured without waiting."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

MOST_AHEAD = 4  # calls that a GPU has not begun or finished when the next one is queued


@dataclass(slots=True, eq=False)
class Account:
    """The device time of a shape."""

    seconds: float = 0.0
    last_call: float = 0.0  # seconds of the last one that was measured
    ticks: int = 0  # denoiser calls
    drawing: bool = False  # requests of the shape wait for lanes or are in them


class Event(Protocol):
    """A point in a GPU's queue: torch.cuda.Event."""

    def record(self) -> None:
        """Queue it."""

    def query(self) -> bool:
        """Tell whether the device has reached it."""

    def synchronize(self) -> None:
        """Wait until the device has reached it."""

    def elapsed_time(self, end_event: Any) -> float:
        """Return the milliseconds from this event to a later one; both were reached."""


@dataclass(frozen=True, slots=True)
class _Call:
    """A call that the device may not have finished."""

    start: Event
    end: Event
    accounts: Sequence[Account]
    estimates: Sequence[float]  # seconds that the accounts were charged with


class DeviceClock:
    """Charges accounts with the device time of calls. Belongs to the engine's thread.

    A CPU has finished a call when it returns. A GPU has not: its calls are measured by events, so
    an account is charged with the time of its last call until the true one is known.

    Args:
        make_event: makes an event of the device; None: calls are finished when they return.
    """

    def __init__(self, make_event: Callable[[], Event] | None) -> None:
        self._make_event = make_event
        self._calls: deque[_Call] = deque()

    @contextmanager
    def charge(self, accounts: Sequence[Account]) -> Iterator[None]:
        """Charge each account with its part of the time of the calls in the block.

        At most MOST_AHEAD blocks are queued on a GPU, so a new request finds a short queue; the
        GPU never runs empty meanwhile.
        """
        if self._make_event is None:
            began = time.perf_counter()
            try:
                yield
            finally:
                _add(accounts, time.perf_counter() - began)
            return
        start, end = self._make_event(), self._make_event()
        start.record()
        try:
            yield
        finally:
            end.record()
            estimates = [account.last_call for account in accounts]
            for account, estimate in zip(accounts, estimates, strict=True):
                account.seconds += estimate
            self._calls.append(_Call(start, end, accounts, estimates))
            self._collect()

    def _collect(self) -> None:
        """Correct the charges of the calls that are finished."""
        if len(self._calls) > MOST_AHEAD:
            self._calls[0].end.synchronize()
        while self._calls and self._calls[0].end.query():
            call = self._calls.popleft()
            _add(call.accounts, call.start.elapsed_time(call.end) / 1000, call.estimates)


def clock_of(device: torch.device) -> DeviceClock:
    """Return the clock of a device."""
    if device.type != "cuda":
        return DeviceClock(None)
    return DeviceClock(partial(torch.cuda.Event, enable_timing=True))


def _add(accounts: Sequence[Account], seconds: float, charged: Sequence[float] = ()) -> None:
    """Charge each account with its part of `seconds`, less what it was charged with before."""
    for i, account in enumerate(accounts):
        account.last_call = seconds / len(accounts)
        account.seconds += account.last_call - (charged[i] if charged else 0.0)

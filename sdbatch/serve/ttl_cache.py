"""What is kept for a while: images that are fetched by URL, and jobs that are asked after."""

import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Generic, TypeVar

Value = TypeVar("Value")


@dataclass
class _Held(Generic[Value]):
    value: Value
    bytes: int
    until: float


class Kept(Generic[Value]):
    """Values by unguessable names, for some seconds and up to some bytes; the oldest go first.

    What has no bytes yet stays its time.
    """

    def __init__(self, seconds: float, most_bytes: int) -> None:
        self._seconds = seconds
        self._most_bytes = most_bytes
        self._held: OrderedDict[str, _Held[Value]] = OrderedDict()
        self._bytes = 0

    def put(self, value: Value, size: int, suffix: str = "") -> str:
        """Keep `value`, of `size` bytes; return its name."""
        name = secrets.token_urlsafe(18) + suffix
        self._held[name] = _Held(value, size, time.monotonic() + self._seconds)
        self._bytes += size
        self._forget()
        return name

    def put_again(self, name: str, value: Value, size: int) -> None:
        """Keep `value`, which has `size` bytes by now, under its old name as if it had come now."""
        held = self._held.pop(name, None)
        self._held[name] = _Held(value, size, time.monotonic() + self._seconds)
        self._bytes += size - (held.bytes if held else 0)
        self._forget()

    def get(self, name: str) -> Value | None:
        """Return the value, None where there is none or no longer."""
        self._forget()
        held = self._held.get(name)
        return None if held is None else held.value

    def _forget(self) -> None:
        now = time.monotonic()
        for name, held in list(self._held.items()):
            last = len(self._held) == 1  # what has just come is kept, whatever its size
            over = self._bytes > self._most_bytes and held.bytes and not last
            if held.until > now and not over:
                if self._bytes <= self._most_bytes:
                    return
                continue
            del self._held[name]
            self._bytes -= held.bytes

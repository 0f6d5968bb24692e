"""Values that are stored for a limited time: images that are fetched by URL, and long jobs."""

import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Generic, TypeVar

Value = TypeVar("Value")


@dataclass
class _Entry(Generic[Value]):
    value: Value
    bytes: int
    expires_at: float


class TTLCache(Generic[Value]):
    """Values under unguessable names, for some seconds and up to some bytes.

    Above the limit of bytes the oldest are evicted first; entries of 0 bytes, which are not
    complete yet, only expire.
    """

    def __init__(self, seconds: float, max_bytes: int) -> None:
        self._seconds = seconds
        self._max_bytes = max_bytes
        self._entries: OrderedDict[str, _Entry[Value]] = OrderedDict()  # the oldest first
        self._bytes = 0

    def put(self, value: Value, size: int, suffix: str = "") -> str:
        """Store `value`, of `size` bytes; return its name."""
        name = secrets.token_urlsafe(18) + suffix
        self._store(name, value, size)
        return name

    def replace(self, name: str, value: Value, size: int) -> None:
        """Store `value`, of `size` bytes, under an existing name; its time starts again."""
        previous = self._entries.pop(name, None)
        self._bytes -= previous.bytes if previous else 0
        self._store(name, value, size)

    def get(self, name: str) -> Value | None:
        """Return a value; None if there is none of this name, or no longer."""
        self._evict()
        entry = self._entries.get(name)
        return None if entry is None else entry.value

    def _store(self, name: str, value: Value, size: int) -> None:
        self._entries[name] = _Entry(value, size, time.monotonic() + self._seconds)
        self._bytes += size
        self._evict()

    def _evict(self) -> None:
        """Remove expired entries, then the oldest above the limit, but never the only one."""
        now = time.monotonic()
        for name, entry in list(self._entries.items()):
            over_limit = self._bytes > self._max_bytes
            evictable = entry.bytes > 0 and len(self._entries) > 1
            if entry.expires_at <= now or (over_limit and evictable):
                del self._entries[name]
                self._bytes -= entry.bytes
            elif not over_limit:
                return

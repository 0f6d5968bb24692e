"""Which shards may share an actor: a shard that an actor has died on is drawn alone."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Gate:
    """Admits many at a time, or one alone."""

    def __init__(self) -> None:
        self._inside = 0
        self._changed = asyncio.Condition()
        self._exclusive = asyncio.Lock()

    @asynccontextmanager
    async def among_others(self) -> AsyncIterator[None]:
        """Enter together with others, as soon as nobody is inside alone."""
        async with self._exclusive, self._changed:
            self._inside += 1
        try:
            yield
        finally:
            async with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Enter as soon as nobody is inside, and keep others out."""
        async with self._exclusive:
            async with self._changed:
                await self._changed.wait_for(lambda: self._inside == 0)
            yield

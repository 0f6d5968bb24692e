"""Who may draw beside whom: a shard that an actor has died on draws alone."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Gate:
    """Lets many in at a time, or one alone."""

    def __init__(self) -> None:
        self._inside = 0
        self._changed = asyncio.Condition()
        self._lonely = asyncio.Lock()

    @asynccontextmanager
    async def among_others(self) -> AsyncIterator[None]:
        """Come in beside others, when nobody is alone inside."""
        async with self._lonely, self._changed:
            self._inside += 1
        try:
            yield
        finally:
            async with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Come in when nobody is inside, and keep the others out."""
        async with self._lonely:
            async with self._changed:
                await self._changed.wait_for(lambda: self._inside == 0)
            yield

"""Images whose replica is lost are drawn again on another one, within the time limit. No Ray here.

An image is a function of its request, so the second try has the same pixels as the first.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Protocol

from sdbatch.errors import SdbatchError, one_line
from sdbatch.serve.drawer import DrawFailure, DrawRequest, EncodedImage, Event, is_on_the_way
from sdbatch.serve.errors import replica_lost
from sdbatch.serve.log import log
from sdbatch.serve.metrics import Metrics

MOST_DEATHS = 3  # of replicas while they drew one image: it may be the cause
PAUSE_SECONDS = 1.0  # before an image is offered again that no replica could accept


class ReplicaDied(Exception):
    """A replica, or its engine, ended while it drew an image."""


class ReplicaUnavailable(Exception):
    """No replica could accept an image, or none could be reached."""


class Drawers(Protocol):
    """The replicas with engines: application.Replicas; in tests a drawer.Drawer."""

    async def draw(self, draw_request: DrawRequest) -> EncodedImage | DrawFailure:
        """Draw an image.

        Raises:
            ReplicaDied, SdbatchError: the replica died, or its engine cannot go on.
            ReplicaUnavailable: no replica could accept the image.
        """

    def draw_events(self, draw_request: DrawRequest) -> AsyncGenerator[Event]:
        """Draw an image; yield its progress and previews, then the image or its failure."""

    async def check_health(self) -> None:
        """Raise an exception, or wait, while no replica can draw."""


_LOST = (ReplicaDied, ReplicaUnavailable, SdbatchError, TimeoutError)  # what ends a try


class RedrawingDrawers:
    """Drawers that draw an image again if its replica is lost."""

    def __init__(self, drawers: Drawers, metrics: Metrics) -> None:
        self._drawers = drawers
        self._metrics = metrics

    async def draw(self, draw_request: DrawRequest, deadline: float) -> EncodedImage | DrawFailure:
        """Draw an image.

        Args:
            draw_request: the image.
            deadline: by the event loop's clock.

        Raises:
            ApiError: replicas died, and there were too many or none came back in time.
            TimeoutError: there was not enough time for other reasons.
        """
        tries = _Tries(deadline, self._metrics)
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    return await self._drawers.draw(draw_request)
            except _LOST as error:
                await tries.prepare_next(error)

    async def draw_events(
        self, draw_request: DrawRequest, deadline: float
    ) -> AsyncGenerator[Event]:
        """Draw an image and yield its events; arguments and errors as those of `draw`.

        When it is drawn again, its progress begins again; no preview is yielded twice.
        """
        tries, previews_sent = _Tries(deadline, self._metrics), 0
        while True:
            previews = 0
            try:
                async with aclosing(self._draw_once(draw_request, deadline)) as events:
                    async for event in events:
                        if isinstance(event, EncodedImage) and event.preview:
                            previews += 1
                            if previews <= previews_sent:
                                continue
                            previews_sent = previews
                        yield event
                return
            except _LOST as error:
                await tries.prepare_next(error)

    async def check_health(self) -> None:
        """Raise an exception, or wait, while no replica can draw."""
        await self._drawers.check_health()

    async def _draw_once(self, draw_request: DrawRequest, deadline: float) -> AsyncGenerator[Event]:
        async with aclosing(self._drawers.draw_events(draw_request)) as events:
            while True:
                async with asyncio.timeout_at(deadline):
                    event = await anext(events, None)
                if event is None:
                    raise ReplicaUnavailable("The stream of the replica ended without its image.")
                yield event
                if not is_on_the_way(event):
                    return


class _Tries:
    """The tries of one image."""

    def __init__(self, deadline: float, metrics: Metrics) -> None:
        self._deadline = deadline
        self._metrics = metrics
        self._deaths = 0
        self._was_lost = False

    async def prepare_next(self, error: Exception) -> None:
        """Return when the image may be tried again; raise an error if it may not.

        Args:
            error: one of _LOST, which ended the last try.
        """
        if isinstance(error, TimeoutError) and not self._was_lost:
            raise error
        seconds_left = self._deadline - asyncio.get_running_loop().time()
        if isinstance(error, TimeoutError) or seconds_left <= 0:
            text = "No replica came back in the time limit of the request. Retry later."
            raise replica_lost(text) from error
        self._was_lost = True
        if isinstance(error, ReplicaUnavailable):
            await asyncio.sleep(min(PAUSE_SECONDS, seconds_left))
            return
        log.warning("a replica was lost while it drew an image: %s", one_line(error))
        self._deaths += 1
        if self._deaths == MOST_DEATHS:
            text = (
                f"{MOST_DEATHS} replicas died while they drew this image, and it may be the "
                f"cause. Change the request, or retry later."
            )
            raise replica_lost(text) from error
        self._metrics.redrawn.inc()

"""Between HTTP and the engines: a place in the queue, a time limit, and results.

Each accepted request ends with its images or with an error.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from typing import Any, TypeVar

from sdbatch.serve.access import ApiKey
from sdbatch.serve.drawer import (
    DrawFailure,
    DrawRequest,
    EncodedImage,
    Event,
    Progress,
    is_on_the_way,
)
from sdbatch.serve.errors import ApiError, invalid_request, shutting_down
from sdbatch.serve.jobs import LongJobs, OnEvent
from sdbatch.serve.kept_jobs import open_storage
from sdbatch.serve.metrics import Metrics
from sdbatch.serve.pictures import Pictures
from sdbatch.serve.queue import ImageQueue, Reservation
from sdbatch.serve.redraw import Drawers, RedrawingDrawers
from sdbatch.serve.requests import ImageRequest, ServedModel

READY_SECONDS = 2.0  # to wait for the health of a replica
RECENT_SECONDS = 30.0  # an image drawn within these shows that the service is ready
PREPARING_THREADS = 2  # that decode pictures; each holds one picture of 64 megapixels at most


Argument = TypeVar("Argument")
Value = TypeVar("Value")


class Service:
    """Everything behind the routes, in front of all replicas. Belongs to one event loop."""

    def __init__(self, model: ServedModel, drawers: Drawers) -> None:
        self.model = model
        self.started = int(time.time())
        self.metrics = Metrics()
        settings = model.job.serve
        self.queue = ImageQueue(settings, self.metrics)
        self.stored_images, stored_jobs = open_storage(settings, model.encoding)
        self.jobs = LongJobs(self.draw, self.restore, self.stored_images, stored_jobs)
        self._timeout_s = settings.timeout_s
        self._drawers = RedrawingDrawers(drawers, self.metrics)
        self._preparers = ThreadPoolExecutor(PREPARING_THREADS)
        self._decoding: dict[str, asyncio.Lock] = {}  # by the key's name

    async def prepare(
        self, image_request: ImageRequest, pictures: Pictures, key: ApiKey
    ) -> ImageRequest:
        """Return the request with its pictures, fitted to its images once for all of them.

        Raises:
            ApiError: a file is no picture, or does not fit; or there is no room in the queue.
        """
        self.queue.check(len(image_request.draw_requests), key)
        prepared = await self.decode(pictures.prepare, image_request.first, key)
        return image_request.with_pictures(prepared)

    async def decode(
        self, work: Callable[[Argument], Value], argument: Argument, key: ApiKey
    ) -> Value:
        """Call what decodes pictures, in one of the few threads for that: one of a key at a time.

        So the pictures of one key cannot hold up those of the others.
        """
        loop = asyncio.get_running_loop()
        async with self._decoding.setdefault(key.name, asyncio.Lock()):
            return await loop.run_in_executor(self._preparers, work, argument)

    def reserve(self, image_request: ImageRequest, key: ApiKey) -> Reservation:
        """Reserve room in the queue; raises as ImageQueue.reserve does."""
        return self.queue.reserve(image_request, key)

    def restore(self, image_request: ImageRequest, key: str) -> Reservation:
        """Reserve room for a job of an earlier process; raises as ImageQueue.restore does."""
        return self.queue.restore(image_request, key)

    async def draw(
        self,
        image_request: ImageRequest,
        reservation: Reservation,
        on_event: OnEvent | None = None,
    ) -> list[EncodedImage]:
        """Draw all images of a request, each when it is its turn.

        Args:
            image_request: what to draw.
            reservation: its own.
            on_event: is called with the progress and the previews of each image.

        Raises:
            ApiError: there was not enough time, or one of them could not be drawn.
        """
        deadline = self._deadline()

        async def draw_one(draw_request: DrawRequest) -> EncodedImage:
            with self._measured():
                async with self.queue.turn(reservation, deadline):
                    if on_event is None:
                        return _require_image(await self._drawers.draw(draw_request, deadline))
                    last: Event | None = None
                    async with aclosing(
                        self._drawers.draw_events(draw_request, deadline)
                    ) as events:
                        async for last in events:
                            if is_on_the_way(last):
                                on_event(draw_request.sample_index, last)
                    return _require_image(last)

        return await self._gather([draw_one(each) for each in image_request.draw_requests])

    async def draw_events(
        self, draw_request: DrawRequest, reservation: Reservation
    ) -> AsyncGenerator[Progress | EncodedImage]:
        """Draw one image; yield its progress, its previews and itself; raises as `draw` does."""
        deadline = self._deadline()
        with reservation:
            with self._time_limit(), self._measured():
                last: Event | None = None
                async with (
                    self.queue.turn(reservation, deadline),
                    aclosing(self._drawers.draw_events(draw_request, deadline)) as events,
                ):
                    async for last in events:
                        if is_on_the_way(last):
                            yield last
                image = _require_image(last)
            yield image

    async def check_ready(self) -> None:
        """Raise an ApiError unless a replica drew recently, or is healthy."""
        if self.queue.stopping:
            raise shutting_down()
        seconds = self.queue.seconds_since_drawn
        if seconds is not None and seconds < RECENT_SECONDS:
            return  # under load a health check would wait behind the images
        try:
            async with asyncio.timeout(READY_SECONDS):
                await self._drawers.check_health()
        except Exception as error:
            text = "The service is not ready: no replica can draw now. Retry later."
            raise ApiError(503, text, code="not_ready", retry_after=5) from error

    async def drain(self, seconds: float) -> int:
        """Accept no more requests and wait for the pending images; return how many are left."""
        self.queue.stopping = True
        deadline = time.monotonic() + seconds
        while self.queue.pending and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        return self.queue.pending

    async def _gather(
        self, coroutines: Sequence[Coroutine[Any, Any, EncodedImage]]
    ) -> list[EncodedImage]:
        """Wait for all images of a request; if one fails, cancel the others."""
        tasks = [asyncio.ensure_future(each) for each in coroutines]
        try:
            with self._time_limit():
                return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    def _deadline(self) -> float:
        return asyncio.get_running_loop().time() + self._timeout_s

    @contextmanager
    def _measured(self) -> Iterator[None]:
        """Count one image by its outcome, with its seconds."""
        started, outcome = time.monotonic(), "cancelled"
        try:
            yield
            outcome = "drawn"
            self.queue.count_drawn()
        except Exception:
            outcome = "failed"
            raise
        finally:
            self.metrics.count_images(outcome, seconds=time.monotonic() - started)

    @contextmanager
    def _time_limit(self) -> Iterator[None]:
        """Turn a TimeoutError into the error response."""
        try:
            yield
        except TimeoutError as error:
            text = (
                f"The request took longer than {self._timeout_s:g} s. Retry later, or "
                f"request fewer images or steps."
            )
            raise ApiError(504, text, code="timeout", retry_after=10) from error


def _require_image(event: Event | None) -> EncodedImage:
    """Return the image that a drawing ended with; raise an ApiError if it failed."""
    if isinstance(event, EncodedImage):
        return event
    if not isinstance(event, DrawFailure):
        raise RuntimeError(f"a drawing ended without an image: {event!r}")
    if event.cause == "safety":
        raise ApiError(400, event.reason, code="content_policy_violation", param="prompt")
    if event.cause == "request":
        raise invalid_request(event.reason)
    raise ApiError(500, event.reason, code="not_drawn")

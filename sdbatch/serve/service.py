"""Between HTTP and the engines: the queue, the time limit, long jobs, and stored images.

Each accepted request ends with its images or with an error.
"""

import asyncio
import logging
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

from cachetools import TTLCache

from sdbatch.serve.access import ApiKey
from sdbatch.serve.drawer import (
    DrawFailure,
    DrawRequest,
    EncodedImage,
    Event,
    ImageFacts,
    Progress,
)
from sdbatch.serve.errors import ApiError, internal_error, invalid_request, invalid_value
from sdbatch.serve.metrics import Metrics
from sdbatch.serve.pictures import Pictures
from sdbatch.serve.requests import ImageRequest, ServedModel

log = logging.getLogger("ray.serve.sdbatch")  # Ray Serve writes what is below its own name
READY_SECONDS = 2.0  # to wait for the health of a replica
RECENT_SECONDS = 30.0  # an image drawn within these shows that the service is ready
JOB_BYTES = 16 * 1024  # of a long job that has ended, besides its images
WAIT_IMAGES = 64  # the last ones, whose times give an estimate of the wait
PREPARING_THREADS = 2  # that decode pictures; each holds one picture of 64 megapixels at most
MAX_PICTURE_BYTES = 2**30  # of the pictures of all images that wait or are being drawn
MAX_WAIT_SECONDS, DEFAULT_WAIT_SECONDS = 60.0, 5.0


Argument = TypeVar("Argument")
Value = TypeVar("Value")


class Drawers(Protocol):
    """The replicas with engines: application.Replicas; in tests a drawer.Drawer."""

    async def draw(self, draw_request: DrawRequest) -> EncodedImage | DrawFailure:
        """Draw an image; raises an ApiError if its replica dies."""

    def draw_events(self, draw_request: DrawRequest) -> AsyncGenerator[Event]:
        """Draw an image; yield its progress and previews, then the image or its failure."""

    async def check_health(self) -> None:
        """Raise an exception, or wait, while no replica can draw."""


class Reservation:
    """Room in the queue for the images of one request; released with its object at the latest."""

    def __init__(
        self,
        number: int,
        images: int,
        pictures_size: int,
        release: Callable[["Reservation"], None],
    ) -> None:
        self.number = number
        self.images = images
        self.pictures_size = pictures_size  # bytes
        self._release: Callable[[Reservation], None] | None = release

    def close(self) -> None:
        """Release it; once is enough."""
        release, self._release = self._release, None
        if release is not None:
            release(self)

    def __enter__(self) -> "Reservation":
        """Return the reservation."""
        return self

    def __exit__(self, *_: object) -> None:
        """Release it."""
        self.close()

    def __del__(self) -> None:
        """Release it if its response was never started because the client disconnected."""
        self.close()


@dataclass(frozen=True)
class ResultImage:
    """An image of a completed request."""

    facts: ImageFacts
    content: bytes | str  # the file; or the name under which the service stores the file


@dataclass(frozen=True)
class Result:
    """A completed request."""

    request: ImageRequest
    images: tuple[ResultImage, ...]
    created: int  # seconds since 1970

    @property
    def size(self) -> int:
        """Return the bytes of its files; stored files count where they are stored."""
        return sum(len(each.content) for each in self.images if isinstance(each.content, bytes))


@dataclass(eq=False)
class LongJob:
    """A request that is accepted at once, drawn later, and polled."""

    name: str
    request: ImageRequest
    key: str  # the name of its API key
    reservation: Reservation
    created: int = field(default_factory=lambda: int(time.time()))
    status: Literal["queued", "drawing", "completed", "failed", "cancelled"] = "queued"
    parts_done: dict[int, float] = field(default_factory=dict)  # by sample index, in [0, 1]
    result: Result | None = None
    error: dict[str, Any] | None = None
    task: "asyncio.Task[None] | None" = None

    @property
    def has_ended(self) -> bool:
        """Tell whether nothing more happens to it."""
        return self.task is None or self.task.done()

    @property
    def progress(self) -> float:
        """Return the part of it that is done, in [0, 1]."""
        if self.status == "completed":
            return 1.0
        return sum(self.parts_done.values()) / len(self.request.draw_requests)

    @property
    def size(self) -> int:
        """Return about how many bytes it takes once it has ended."""
        return JOB_BYTES + (self.result.size if self.result else 0)

    def update(self, sample_index: int, progress: Progress) -> None:
        """Record the progress of one of its images."""
        self.status = "drawing"
        self.parts_done[sample_index] = progress.step / progress.steps


class Service:
    """The queue in front of all replicas. Belongs to one event loop."""

    def __init__(self, model: ServedModel, drawers: Drawers) -> None:
        self.model = model
        self.started = int(time.time())
        self.metrics = Metrics()
        self._settings = model.job.serve
        seconds, max_bytes = self._settings.keep_s, self._settings.keep_mib * 2**20
        self.files: TTLCache[str, bytes] = TTLCache(  # by their secret names
            max_bytes, seconds, getsizeof=lambda file: min(len(file), max_bytes)
        )
        self._running_jobs: dict[str, LongJob] = {}
        self.ended_jobs: TTLCache[str, LongJob] = TTLCache(
            max_bytes, seconds, getsizeof=lambda job: min(job.size, max_bytes)
        )
        self._drawers = drawers
        self._queue: dict[int, int] = {}  # number of a reservation -> its images
        self._pictures_size = 0  # bytes of all reservations
        self._preparers = ThreadPoolExecutor(PREPARING_THREADS)
        self._last_number = 0
        self._drawn_at: deque[float] = deque(maxlen=WAIT_IMAGES)
        self._stopping = False

    @property
    def pending(self) -> int:
        """Return how many images wait or are being drawn."""
        return sum(self._queue.values())

    def queue_position(self, reservation: Reservation) -> int:
        """Return how many pending images are before those of `reservation`."""
        return sum(images for number, images in self._queue.items() if number < reservation.number)

    async def prepare(self, image_request: ImageRequest, pictures: Pictures) -> ImageRequest:
        """Return the request with its pictures, fitted to its images once for all of them.

        Raises:
            ApiError: a file is no picture, or does not fit.
        """
        prepared = await self.decode(pictures.prepare, image_request.first)
        return image_request.with_pictures(prepared)

    async def decode(self, work: Callable[[Argument], Value], argument: Argument) -> Value:
        """Call what decodes pictures, in one of the few threads for that."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._preparers, work, argument)

    def reserve(self, image_request: ImageRequest, key: ApiKey) -> Reservation:
        """Reserve room for the images of a request in the queue.

        Raises:
            ApiError: the queue is full, the key's limit is reached, or the service shuts down.
        """
        if self._stopping:
            raise _shutting_down()
        images, queue = len(image_request.draw_requests), self._settings.queue
        if images > queue:
            raise invalid_value("n", f"{images}: must be {queue} at most, the length of the queue")
        full = self._pictures_size + image_request.pictures_size > MAX_PICTURE_BYTES
        if self.pending + images > queue or full:
            self.metrics.images.labels("refused").inc(images)
            raise ApiError(
                503,
                f"The queue is full: {self.pending} images wait. Retry later.",
                code="overloaded",
                retry_after=self._estimate_wait(images),
            )
        key.spend(images)
        self._last_number += 1
        self._queue[self._last_number] = images
        self._pictures_size += image_request.pictures_size
        self.metrics.open.set(self.pending)
        return Reservation(self._last_number, images, image_request.pictures_size, self._release)

    async def draw(self, image_request: ImageRequest) -> list[EncodedImage]:
        """Draw all images of a request that has a reservation.

        Raises:
            ApiError: there was not enough time, or one of them could not be drawn.
        """

        async def draw_one(draw_request: DrawRequest) -> EncodedImage:
            with self._measured():
                return _require_image(await self._drawers.draw(draw_request))

        return await self._gather([draw_one(each) for each in image_request.draw_requests])

    async def draw_events(
        self, draw_request: DrawRequest, reservation: Reservation
    ) -> AsyncGenerator[Progress | EncodedImage]:
        """Draw one image; yield its progress, its previews and itself; raises as `draw` does."""
        deadline = self._deadline()
        with reservation:
            with self._time_limit(), self._measured():
                async with aclosing(self._drawers.draw_events(draw_request)) as events:
                    while True:
                        async with asyncio.timeout_at(deadline):
                            event = await anext(events)
                        if isinstance(event, DrawFailure):
                            break
                        if isinstance(event, EncodedImage) and not event.preview:
                            break
                        yield event
                image = _require_image(event)
            yield image

    def store(self, image_request: ImageRequest, images: Sequence[EncodedImage]) -> Result:
        """Return the result of a drawn request; store the files that are fetched by URL."""
        files = [image.file for image in images]
        contents: Sequence[bytes | str] = files
        if image_request.by_url:
            stored = {f"{_secret_name()}.{image_request.image_format}": file for file in files}
            self.files.update(stored)
            contents = list(stored)
        pairs = zip(images, contents, strict=True)
        return Result(
            image_request.without_pictures(),
            tuple(ResultImage(image.facts, content) for image, content in pairs),
            created=int(time.time()),
        )

    def start_job(self, image_request: ImageRequest, key: ApiKey) -> LongJob:
        """Accept a long job."""
        reservation = self.reserve(image_request, key)
        job = LongJob(_secret_name(), image_request, key.name, reservation)
        self._running_jobs[job.name] = job
        job.task = asyncio.ensure_future(self._run_job(job))
        return job

    def find_job(self, name: str) -> LongJob | None:
        """Return a long job; None if there is none of this name, or no longer."""
        return self._running_jobs.get(name) or self.ended_jobs.get(name)

    async def cancel_job(self, job: LongJob) -> None:
        """Cancel a long job; its lanes are released at the next tick.

        Raises:
            ApiError: it has ended.
        """
        if job.task is None or job.has_ended:
            text = f"The job has ended ({job.status}), so it cannot be cancelled."
            raise ApiError(409, text, code="job_ended")
        job.task.cancel()
        await asyncio.wait([job.task])

    async def check_ready(self) -> None:
        """Raise an ApiError unless a replica drew recently, or is healthy."""
        if self._stopping:
            raise _shutting_down()
        if self._drawn_at and time.monotonic() - self._drawn_at[-1] < RECENT_SECONDS:
            return  # under load a health check would wait behind the images
        try:
            async with asyncio.timeout(READY_SECONDS):
                await self._drawers.check_health()
        except Exception as error:
            text = "The service is not ready: no replica can draw now. Retry later."
            raise ApiError(503, text, code="not_ready", retry_after=5) from error

    async def drain(self, seconds: float) -> int:
        """Accept no more requests and wait for the pending images; return how many are left."""
        self._stopping = True
        deadline = time.monotonic() + seconds
        while self.pending and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        return self.pending

    async def _run_job(self, job: LongJob) -> None:
        async def draw_one(draw_request: DrawRequest) -> EncodedImage:
            last: Event | None = None
            with self._measured():
                async with aclosing(self._drawers.draw_events(draw_request)) as events:
                    async for last in events:
                        if isinstance(last, Progress):
                            job.update(draw_request.sample_index, last)
                return _require_image(last)

        with job.reservation:
            try:
                images = await self._gather([draw_one(each) for each in job.request.draw_requests])
                job.result = self.store(job.request, images)
                job.status = "completed"
            except ApiError as error:
                job.status, job.error = "failed", error.body["error"]
            except asyncio.CancelledError:
                job.status = "cancelled"
            except Exception:
                log.exception("a long job failed")
                job.status, job.error = "failed", internal_error().body["error"]
        job.request = job.request.without_pictures()
        del self._running_jobs[job.name]
        self.ended_jobs[job.name] = job

    async def _gather(
        self, coroutines: Sequence[Coroutine[Any, Any, EncodedImage]]
    ) -> list[EncodedImage]:
        """Wait for all images of a request; if one fails, or time is up, cancel the others."""
        tasks = [asyncio.ensure_future(each) for each in coroutines]
        try:
            with self._time_limit():
                async with asyncio.timeout_at(self._deadline()):
                    return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    def _deadline(self) -> float:
        return asyncio.get_running_loop().time() + self._settings.timeout_s

    def _release(self, reservation: Reservation) -> None:
        del self._queue[reservation.number]
        self._pictures_size -= reservation.pictures_size
        self.metrics.open.set(self.pending)

    def _estimate_wait(self, images: int) -> float:
        """Estimate the seconds until `images` images are drawn, from the times of the last ones."""
        if len(self._drawn_at) < 2:
            return DEFAULT_WAIT_SECONDS
        each = (self._drawn_at[-1] - self._drawn_at[0]) / (len(self._drawn_at) - 1)
        return min(MAX_WAIT_SECONDS, max(1.0, each * images))

    @contextmanager
    def _measured(self) -> Iterator[None]:
        """Count one image by its outcome; of a drawn one, record the seconds."""
        started, outcome = time.monotonic(), "cancelled"
        try:
            yield
            outcome = "drawn"
            self._drawn_at.append(time.monotonic())
            self.metrics.seconds.observe(time.monotonic() - started)
        except Exception:
            outcome = "failed"
            raise
        finally:
            self.metrics.images.labels(outcome).inc()

    @contextmanager
    def _time_limit(self) -> Iterator[None]:
        """Turn a TimeoutError into the error response."""
        try:
            yield
        except TimeoutError as error:
            text = (
                f"The request took longer than {self._settings.timeout_s:g} s. Retry later, or "
                f"request fewer images or steps."
            )
            raise ApiError(504, text, code="timeout", retry_after=10) from error


def _secret_name() -> str:
    """Return a name that cannot be guessed."""
    return secrets.token_urlsafe(18)


def _shutting_down() -> ApiError:
    text = "The service is shutting down. Retry later."
    return ApiError(503, text, code="stopping", retry_after=5)


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

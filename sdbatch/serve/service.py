"""Between HTTP and the engines: a place in the queue, a time limit, and what ends a request early.

Nothing is taken in that cannot be kept: whoever has a place gets an image or a reason.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from sdbatch.serve.access import Key
from sdbatch.serve.drawer import Asked, NotDrawn, Picture, Step
from sdbatch.serve.errors import Refusal, internal
from sdbatch.serve.metrics import Metrics
from sdbatch.serve.requests import Offer, Wanted
from sdbatch.serve.ttl_cache import Kept

log = logging.getLogger("ray.serve.sdbatch")  # Ray Serve writes what is below its own name
Event = Step | Picture | NotDrawn
READY_SECONDS, OF_LATE = 2.0, 30.0
JOB_BYTES = 16 * 1024  # of a long job that has ended, beside its images
LAST = 64  # images from whose times the wait is foretold


class Drawers(Protocol):
    """The replicas with engines: application.Replicas; in tests a drawer.Drawer."""

    async def draw(self, asked: Asked) -> Picture | NotDrawn:
        """Draw an image; raises a Refusal if its replica is lost."""

    def follow(self, asked: Asked) -> AsyncGenerator[Event]:
        """Draw an image and tell of it on its way; the last event is what came of it."""

    async def check_health(self) -> None:
        """Raise an exception, or wait, while no replica can draw."""


class Place:
    """Room for the images of one request. It ends with its object at the latest."""

    def __init__(self, number: int, images: int, free: Callable[["Place"], None]) -> None:
        self.number = number
        self.images = images
        self._free: Callable[[Place], None] | None = free

    def close(self) -> None:
        """Give it back."""
        free, self._free = self._free, None
        if free is not None:
            free(self)

    def __enter__(self) -> "Place":
        """Return the place."""
        return self

    def __exit__(self, *_: object) -> None:
        """Give it back."""
        self.close()

    def __del__(self) -> None:
        """Give back the place of an answer that was never begun, as its client had gone."""
        self.close()


@dataclass(eq=False)
class LongJob:
    """A request that is answered at once and drawn later."""

    wanted: Wanted
    key: str
    place: Place
    created: int = field(default_factory=lambda: int(time.time()))
    status: str = "queued"  # drawing, completed, failed, cancelled
    steps: dict[int, float] = field(default_factory=dict)  # image -> its part that is done
    pictures: list[Picture] = field(default_factory=list)
    result: Any = None  # told.Images, when it has been asked for
    error: dict[str, Any] | None = None
    task: "asyncio.Task[None] | None" = None

    @property
    def progress(self) -> float:
        """Return the part of it that is done, in [0, 1]."""
        return sum(self.steps.values()) / len(self.wanted.asked)

    def tell(self, image: int, step: Step) -> None:
        """Take in how far an image is."""
        self.status = "drawing"
        self.steps[image] = step.done / step.of


class Service:
    """The queue before all replicas. Belongs to one event loop."""

    def __init__(self, offer: Offer, drawers: Drawers) -> None:
        self.offer = offer
        self.began = int(time.time())
        self.metrics = Metrics()
        self._settings = offer.job.serve
        seconds, most = self._settings.keep_s, self._settings.keep_mib * 2**20
        self.images: Kept[tuple[bytes, str]] = Kept(seconds, most)  # file, media type
        self.jobs: Kept[LongJob] = Kept(seconds, most)
        self._drawers = drawers
        self._places: dict[int, int] = {}  # number of a place -> its images
        self._given = 0
        self._ends: deque[float] = deque(maxlen=LAST)  # when the last images were drawn
        self._stopping = False

    @property
    def open(self) -> int:
        """Return how many images are taken in and not yet drawn."""
        return sum(self._places.values())

    def ahead(self, place: Place) -> int:
        """Return how many open images were taken in before those of `place`."""
        return sum(images for number, images in self._places.items() if number < place.number)

    def take(self, images: int, key: Key) -> Place:
        """Take in so many images.

        Raises:
            Refusal: the queue is full, the key has spent its images, or the service stops.
        """
        if self._stopping:
            raise _stopping()
        queue = self._settings.queue
        if images > queue:
            text = f"n = {images}: the queue holds {queue}."
            raise Refusal(400, text, code="invalid_value", param="n")
        if self.open + images > queue:
            self.metrics.images.labels("refused").inc(images)
            raise Refusal(
                503,
                f"queue = full: {self.open} images wait of {queue} that may. Try again later.",
                code="overloaded",
                retry_after=self._wait(images),
            )
        key.spend(images)
        self._given += 1
        self._places[self._given] = images
        self.metrics.open.set(self.open)
        return Place(self._given, images, self._free)

    async def draw(self, wanted: Wanted) -> list[Picture]:
        """Draw all images of a request that has a place.

        Raises:
            Refusal: there was no time, or one of them could not be drawn.
        """

        async def one(asked: Asked) -> Picture:
            with self._counted() as ended:
                return ended(await self._drawers.draw(asked))

        return await self._all([one(asked) for asked in wanted.asked])

    async def follow(self, asked: Asked, place: Place) -> AsyncGenerator[Step | Picture]:
        """Draw the one image of `place` and yield what happens to it; raises as draw does."""
        until = self._until()
        with place, _in_time(), self._counted() as ended:
            async with aclosing(self._drawers.follow(asked)) as events:
                while True:
                    async with asyncio.timeout_at(until):
                        event = await anext(events)
                    if isinstance(event, Step) or (isinstance(event, Picture) and event.preview):
                        yield event
                    else:
                        yield ended(event)
                        return

    def begin(self, wanted: Wanted, key: Key) -> str:
        """Take in a request that is asked after later; return its job's name."""
        job = LongJob(wanted, key.name, self.take(len(wanted.asked), key))
        name = self.jobs.put(job, 0)
        job.task = asyncio.ensure_future(self._run(job, name))
        return name

    async def check_ready(self) -> None:
        """Raise a Refusal unless a replica drew of late, or says that it can draw."""
        if self._stopping:
            raise _stopping()
        if self._ends and time.monotonic() - self._ends[-1] < OF_LATE:
            return  # under load the question would wait behind the images
        try:
            async with asyncio.timeout(READY_SECONDS):
                await self._drawers.check_health()
        except Exception as error:
            text = "service = not ready: no replica can draw now. Try again later."
            raise Refusal(503, text, code="not_ready", retry_after=5) from error

    async def drain(self, seconds: float) -> int:
        """Take nothing in any more and wait for what is open; return how much of it is left."""
        self._stopping = True
        until = time.monotonic() + seconds
        while self.open and time.monotonic() < until:
            await asyncio.sleep(0.05)
        return self.open

    async def _run(self, job: LongJob, name: str) -> None:
        async def one(image: int, asked: Asked) -> Picture:
            last: Event | None = None
            with self._counted() as ended:
                async with aclosing(self._drawers.follow(asked)) as events:
                    async for last in events:
                        if isinstance(last, Step):
                            job.tell(image, last)
                return ended(last)

        with job.place:
            try:
                asked = enumerate(job.wanted.asked)
                job.pictures = await self._all([one(i, each) for i, each in asked])
                job.status = "completed"
            except Refusal as refusal:
                job.status, job.error = "failed", refusal.body["error"]
            except asyncio.CancelledError:
                job.status = "cancelled"
            except Exception:
                log.exception("a long job failed")
                job.status, job.error = "failed", internal().body["error"]
        size = sum(len(picture.file) for picture in job.pictures) * 4 // 3  # as base64
        self.jobs.put_again(name, job, JOB_BYTES + size)

    async def _all(self, drawing: list[Any]) -> list[Picture]:
        """Wait for all images of a request; when one fails, or time is up, cancel the others."""
        tasks = [asyncio.ensure_future(one) for one in drawing]
        try:
            with _in_time():
                async with asyncio.timeout_at(self._until()):
                    pictures: list[Picture] = await asyncio.gather(*tasks)
                    return pictures
        finally:
            for task in tasks:
                task.cancel()

    def _until(self) -> float:
        return asyncio.get_running_loop().time() + self._settings.timeout_s

    def _free(self, place: Place) -> None:
        del self._places[place.number]
        self.metrics.open.set(self.open)

    def _wait(self, images: int) -> float:
        """Foretell the seconds until so many are drawn, by how fast the last ones were."""
        if len(self._ends) < 2:
            return 5.0
        each = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
        return min(60.0, max(1.0, each * images))

    @contextmanager
    def _counted(self) -> Iterator[Callable[[Any], Picture]]:
        """Yield what takes in the outcome of one image: counts it, and raises if it is none."""
        began, outcome = time.monotonic(), "cancelled"

        def ended(event: Picture | NotDrawn) -> Picture:
            nonlocal outcome
            outcome = "failed" if isinstance(event, NotDrawn) else "drawn"
            if isinstance(event, NotDrawn):
                raise _not_drawn(event)
            if not isinstance(event, Picture):
                raise RuntimeError(f"{event}: a drawing that ended without an image")
            self._ends.append(time.monotonic())
            self.metrics.seconds.observe(time.monotonic() - began)
            return event

        try:
            yield ended
        except Exception:
            outcome = "failed"
            raise
        finally:
            self.metrics.images.labels(outcome).inc()


@contextmanager
def _in_time() -> Iterator[None]:
    try:
        yield
    except TimeoutError as error:
        text = "serve.timeout_s = over: the service is too busy, or this is too much at a time."
        raise Refusal(504, text, code="timeout", retry_after=10) from error


def _stopping() -> Refusal:
    return Refusal(503, "service = stopping: ask again.", code="stopping", retry_after=5)


def _not_drawn(event: NotDrawn) -> Refusal:
    if event.fault == "safety":
        return Refusal(400, f"{event.reason}.", code="content_policy_violation", param="prompt")
    if event.fault == "request":
        param, equals, _ = event.reason.partition(" = ")
        text = f"{event.reason}."
        return Refusal(400, text, code="invalid_value", param=param if equals else None)
    return Refusal(500, f"{event.reason}.", code="not_drawn")

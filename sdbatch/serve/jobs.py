"""Long jobs: requests that are accepted at once, drawn later, and polled."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from cachetools import TTLCache

from sdbatch.job import Serve
from sdbatch.serve.drawer import EncodedImage, Progress
from sdbatch.serve.errors import ApiError, internal_error
from sdbatch.serve.queue import Reservation
from sdbatch.serve.requests import ImageRequest
from sdbatch.serve.results import Result, StoredImages, secret_name

log = logging.getLogger("ray.serve.sdbatch")
JOB_BYTES = 16 * 1024  # of a long job that has ended, besides its images
OnEvent = Callable[[int, Progress | EncodedImage], None]  # sample index; progress or preview
Draw = Callable[[ImageRequest, Reservation, OnEvent], Awaitable[list[EncodedImage]]]


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

    def update(self, sample_index: int, event: Progress | EncodedImage) -> None:
        """Record the progress of one of its images."""
        if isinstance(event, Progress):
            self.status = "drawing"
            self.parts_done[sample_index] = event.step / event.steps


class LongJobs:
    """The long jobs of a service: the running ones, and for a limited time those that have ended.

    Args:
        draw: draws all images of a request and calls back with each event.
        stored_images: stores the images that are fetched by URL.
        settings: the job's `serve`.
    """

    def __init__(self, draw: Draw, stored_images: StoredImages, settings: Serve) -> None:
        self._draw = draw
        self._stored_images = stored_images
        self._running: dict[str, LongJob] = {}
        max_bytes = settings.keep_mib * 2**20
        self.ended: TTLCache[str, LongJob] = TTLCache(
            max_bytes, settings.keep_s, getsizeof=lambda job: min(job.size, max_bytes)
        )

    def start(self, image_request: ImageRequest, key: str, reservation: Reservation) -> LongJob:
        """Accept a long job.

        Args:
            image_request: its images.
            key: the name of its API key.
            reservation: of its images; released when it ends.
        """
        job = LongJob(secret_name(), image_request, key, reservation)
        self._running[job.name] = job
        job.task = asyncio.ensure_future(self._run(job))
        return job

    def find(self, name: str) -> LongJob | None:
        """Return a long job; None if there is none of this name, or no longer."""
        return self._running.get(name) or self.ended.get(name)

    async def cancel(self, job: LongJob) -> None:
        """Cancel a long job; its lanes are released at the next tick.

        Raises:
            ApiError: it has ended.
        """
        if job.task is None or job.has_ended:
            text = f"The job has ended ({job.status}), so it cannot be cancelled."
            raise ApiError(409, text, code="job_ended")
        job.task.cancel()
        await asyncio.wait([job.task])

    async def _run(self, job: LongJob) -> None:
        with job.reservation:
            try:
                images = await self._draw(job.request, job.reservation, job.update)
                job.result = self._stored_images.store(job.request, images)
                job.status = "completed"
            except ApiError as error:
                job.status, job.error = "failed", error.body["error"]
            except asyncio.CancelledError:
                job.status = "cancelled"
            except Exception:
                log.exception("a long job failed")
                job.status, job.error = "failed", internal_error().body["error"]
        job.request = job.request.without_pictures()
        del self._running[job.name]
        self.ended[job.name] = job

"""Long jobs: requests that are accepted at once, drawn later, and polled."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

from cachetools import TTLCache

from sdbatch.job import Serve
from sdbatch.serve.drawer import EncodedImage, Progress
from sdbatch.serve.errors import ApiError, internal_error
from sdbatch.serve.log import log
from sdbatch.serve.metrics import key_name
from sdbatch.serve.queue import Reservation
from sdbatch.serve.requests import ImageRequest
from sdbatch.serve.results import Result, StoredImages, seconds_of, secret_name

JOB_BYTES = 16 * 1024  # of a long job that has ended, besides its images
MAINTENANCE_SECONDS = 30.0  # between two times that what has expired is removed
RETRY_SECONDS, LONGEST_RETRY_SECONDS = 1.0, 30.0  # until a store that failed is tried again
OnEvent = Callable[[int, Progress | EncodedImage], None]  # sample index; progress or preview
Draw = Callable[[ImageRequest, Reservation, OnEvent], Awaitable[list[EncodedImage]]]
Restore = Callable[[ImageRequest, str], Reservation]  # the images and the name of their key
Value = TypeVar("Value")


@dataclass(frozen=True)
class JobEnd:
    """How a long job ended."""

    status: Literal["completed", "failed", "cancelled"]
    result: Result | None = None
    error: dict[str, Any] | None = None
    at: float = field(default_factory=time.time)  # seconds since 1970


@dataclass(eq=False)
class LongJob:
    """A request that is accepted at once, drawn later, and polled."""

    name: str
    request: ImageRequest
    key: str  # the name of its API key
    reservation: Reservation | None = None  # None: it had ended when it was read from a store
    parts_done: dict[int, float] = field(default_factory=dict)  # by sample index, in [0, 1]
    end: JobEnd | None = None
    task: "asyncio.Task[None] | None" = None

    @property
    def created(self) -> int:
        """Return when it was accepted, in seconds since 1970."""
        return int(seconds_of(self.name))

    @property
    def status(self) -> Literal["queued", "drawing", "completed", "failed", "cancelled"]:
        """Return what happens to it now, or how it ended."""
        if self.end is not None:
            return self.end.status
        return "drawing" if self.parts_done else "queued"

    @property
    def result(self) -> Result | None:
        """Return its images if it has completed."""
        return None if self.end is None else self.end.result

    @property
    def error(self) -> dict[str, Any] | None:
        """Return why it failed, if it did."""
        return None if self.end is None else self.end.error

    @property
    def has_ended(self) -> bool:
        """Tell whether nothing more happens to it."""
        return self.end is not None

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
            self.parts_done[sample_index] = event.step / event.steps

    def finish(self, end: JobEnd) -> None:
        """Record how it ended; what is stored of it from now on has no pictures."""
        self.end = end
        self.request = self.request.without_pictures()


class StoredJobs(Protocol):
    """Where long jobs are stored: in memory, or in a store that survives a restart."""

    async def accept(self, job: LongJob) -> None:
        """Store a job that is being accepted; raises an ApiError, 503, if that is impossible."""

    async def end(self, job: LongJob, end: JobEnd) -> bool:
        """Store how a job ended, and call its `finish`; raises as `accept` does.

        Returns:
            False if it had ended already: then what is stored stays as it is.
        """

    async def find(self, name: str) -> LongJob | None:
        """Return a stored job; None if there is none of this name, or no longer.

        Raises:
            ApiError: as `accept`; or 410 if the job is lost.
        """

    async def remove_expired(self, running: frozenset[str]) -> list[str]:
        """Remove the jobs that have expired; raises as `accept` does.

        Args:
            running: the names of those that must stay.

        Returns:
            the names of the others that have not ended, in the order of their acceptance.
        """


class JobsInMemory:
    """Ended jobs in memory; those polled least recently are evicted."""

    def __init__(self, settings: Serve) -> None:
        max_bytes = settings.keep_mib * 2**20
        self.ended: TTLCache[str, LongJob] = TTLCache(
            max_bytes, settings.keep_s, getsizeof=lambda job: min(job.size, max_bytes)
        )

    async def accept(self, job: LongJob) -> None:
        """Leave a job that is not drawn yet to its LongJobs."""

    async def end(self, job: LongJob, end: JobEnd) -> bool:
        """Store how a job ended; return False if it had ended already."""
        if job.has_ended:
            return False
        job.finish(end)
        self.ended[job.name] = job
        return True

    async def find(self, name: str) -> LongJob | None:
        """Return an ended job; None if there is none of this name, or no longer."""
        return self.ended.get(name)

    async def remove_expired(self, running: frozenset[str]) -> list[str]:
        """Remove the jobs that have expired; all others have ended."""
        self.ended.expire()
        return []


class LongJobs:
    """The long jobs of a service: the running ones, and for a limited time those that have ended.

    Args:
        draw: draws all images of a request and calls back with each event.
        restore: reserves room for a job that was accepted before a restart.
        stored_images: stores the images that are fetched by URL.
        stored_jobs: stores the jobs.
    """

    def __init__(
        self, draw: Draw, restore: Restore, stored_images: StoredImages, stored_jobs: StoredJobs
    ) -> None:
        self._draw = draw
        self._restore = restore
        self._stored_images = stored_images
        self.stored = stored_jobs
        self._running: dict[str, LongJob] = {}
        self._lost: set[str] = set()  # names of jobs that the log has reported

    async def start(
        self, image_request: ImageRequest, key: str, reservation: Reservation
    ) -> LongJob:
        """Accept a long job; it is stored when this returns.

        Args:
            image_request: its images.
            key: the name of its API key.
            reservation: of its images; released when it ends.

        Raises:
            ApiError: 503 if it cannot be stored.
        """
        job = LongJob(secret_name(), image_request, key, reservation)
        self._running[job.name] = job  # before it is stored: `maintain` must not resume it
        try:
            await self.stored.accept(job)
        except BaseException:
            del self._running[job.name]
            reservation.close()
            raise
        job.task = asyncio.ensure_future(self._run(job, reservation))
        return job

    async def find(self, name: str) -> LongJob | None:
        """Return a long job; None if there is none of this name, or no longer.

        One that was accepted by another process and has not ended is resumed.

        Raises:
            ApiError: 503 if the store cannot be read, or the service shuts down; 410 if the job
                is lost.
        """
        running = self._running.get(name)
        job = running or await self.stored.find(name)
        if job is None or job is running or job.has_ended:
            return job
        return self._running.get(name) or self._resume(job)

    async def cancel(self, job: LongJob) -> None:
        """Cancel a long job; its lanes are released at the next tick.

        Raises:
            ApiError: 409 if it has ended, 503 if the store cannot be written.
        """
        if job.has_ended or not await self.stored.end(job, JobEnd("cancelled")):
            how = f" ({job.status})" if job.has_ended else ""
            text = f"The job has ended{how}, so it cannot be cancelled."
            raise ApiError(409, text, code="job_ended")
        if job.task is not None:
            job.task.cancel()
            await asyncio.wait([job.task])

    async def maintain(self) -> None:
        """Resume what an earlier process left, and remove what has expired, until cancelled."""
        failures = 0
        while True:
            try:
                await self._maintain_once()
                failures = 0
            except ApiError:  # of the store: the log has it
                failures += 1
            except Exception:
                log.exception("the maintenance of long jobs failed")
                failures += 1
            await asyncio.sleep(_pause(failures) if failures else MAINTENANCE_SECONDS)

    async def _maintain_once(self) -> None:
        unfinished = await self.stored.remove_expired(frozenset(self._running))
        for name in unfinished:
            try:
                await self.find(name)
            except ApiError as error:
                if error.status != 410:
                    raise
                if name not in self._lost:
                    log.error("A long job of %s is lost: %s", _time_of(name), error)
                    self._lost.add(name)
            except Exception:  # of this job alone: it must not hold up the others
                log.exception("A long job of %s cannot be read.", _time_of(name))
        self._lost.intersection_update(unfinished)
        await self._stored_images.remove_expired()

    def _resume(self, job: LongJob) -> LongJob:
        job.reservation = self._restore(job.request, job.key)
        self._running[job.name] = job
        job.task = asyncio.ensure_future(self._run(job, job.reservation))
        log.info("A long job of %s is drawn again.", _time_of(job.name))
        return job

    async def _run(self, job: LongJob, reservation: Reservation) -> None:
        """Draw a job and store how it ended.

        If this is cancelled because the process ends, the job stays unfinished in a store.
        """
        key_name.set(job.key)  # whose images are counted
        with reservation:
            try:
                end = await self._draw_job(job, reservation)
                await _until_stored(lambda: self.stored.end(job, end))
            finally:
                del self._running[job.name]

    async def _draw_job(self, job: LongJob, reservation: Reservation) -> JobEnd:
        try:
            images = await self._draw(job.request, reservation, job.update)
            result = await _until_stored(lambda: self._stored_images.store(job.request, images))
            return JobEnd("completed", result=result)
        except ApiError as error:
            return JobEnd("failed", error=error.body["error"])
        except Exception:
            log.exception("a long job failed")
            return JobEnd("failed", error=internal_error().body["error"])


async def _until_stored(work: Callable[[], Awaitable[Value]]) -> Value:
    """Return what `work` returns, once the store can be written.

    What is drawn waits for that in memory. The job keeps its room in the queue meanwhile, which
    bounds the memory.
    """
    failures = 0
    while True:
        try:
            return await work()
        except ApiError as error:
            if error.status != 503:
                raise
        failures += 1
        await asyncio.sleep(_pause(failures))


def _pause(failures: int) -> float:
    return min(LONGEST_RETRY_SECONDS, RETRY_SECONDS * 2.0 ** min(failures - 1, 10))


def _time_of(name: str) -> str:
    """Return what may be shown of a secret name: when it was made."""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds_of(name)))

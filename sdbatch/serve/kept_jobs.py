"""Long jobs in the store of `serve.keep`.

    NAME.json              an accepted job, written before the 202 is sent
    NAME.pictures          its pictures, until it ends
    NAME.WRITER.0.png      an image of a completed job, unless it is fetched by URL; WRITER: the
                           process that drew it
    NAME.end.json          how it ended, written last

The file of the end is created on condition that it does not exist. So if two processes draw a job,
as they may for a moment when a service is replaced, the first end counts and the other process
removes its images: no two results are ever seen. A job without this file is drawn again by the
process that finds it.
"""

import asyncio
import contextlib
import hashlib
import secrets
import time
from collections import defaultdict
from dataclasses import replace
from functools import partial

from sdbatch.job import Serve
from sdbatch.output.image_file import Encoding
from sdbatch.serve import records
from sdbatch.serve.errors import ApiError
from sdbatch.serve.jobs import JOB_BYTES, JobEnd, JobsInMemory, LongJob, StoredJobs
from sdbatch.serve.keep import IMAGES, JOBS, Folder, KeptImages, Room
from sdbatch.serve.records import AcceptedRecord, DamagedRecord, EndedImage, EndedRecord
from sdbatch.serve.requests import ImageRequest
from sdbatch.serve.results import (
    SECRET_NAME,
    ImagesInMemory,
    Result,
    ResultImage,
    StoredImages,
    seconds_of,
)
from sdbatch.storage import Store

_ACCEPTED, _PICTURES, _END = ".json", ".pictures", ".end.json"
_Files = dict[str, int]  # suffix after the job's name -> bytes


def open_storage(settings: Serve, encoding: Encoding) -> tuple[StoredImages, StoredJobs]:
    """Return where images by URL and long jobs are stored: in `serve.keep`, or in memory.

    Args:
        settings: the job's `serve`.
        encoding: names the model that is served, and this version.
    """
    if settings.keep is None:
        return ImagesInMemory(settings), JobsInMemory(settings)
    images, jobs = Folder(settings.keep, IMAGES), Folder(settings.keep, JOBS)
    return KeptImages(images, settings), KeptJobs(jobs, settings, encoding)


class KeptJobs:
    """Long jobs in the store; of those that have ended, the oldest are evicted.

    Args:
        folder: of the jobs.
        settings: the job's `serve`.
        encoding: names the model that is served, and this version.
    """

    def __init__(self, folder: Folder, settings: Serve, encoding: Encoding) -> None:
        self._folder = folder
        self._keep_s = settings.keep_s
        self._encoding = encoding
        self._room = Room(folder, settings.keep_mib * 2**20, self._evict)
        self._writer = secrets.token_hex(8)
        self._ended_at: dict[str, float] = {}  # of old jobs whose record was read

    async def accept(self, job: LongJob) -> None:
        """Store a job that is being accepted; raises an ApiError, 503, if that is impossible."""
        name = job.name

        def write(store: Store) -> None:
            pictures = records.pictures_of(job)
            if pictures is not None:
                store.put(name + _PICTURES, pictures)
            store.put(name + _ACCEPTED, records.write_accepted(job))

        def undo(store: Store) -> None:
            store.remove(name + _ACCEPTED)
            store.remove(name + _PICTURES)

        await self._folder.write(write, undo=undo)

    async def end(self, job: LongJob, end: JobEnd) -> bool:
        """Store how a job ended: its images, then the record; return False if it had ended.

        Raises:
            ApiError: 503 if that is impossible now.
        """
        images = () if end.result is None else end.result.images
        files = {
            f"{job.name}.{self._writer}.{i}.{job.request.image_format}": image.content
            for i, image in enumerate(images)
            if isinstance(image.content, bytes)
        }
        names = list(files) or [str(image.content) for image in images]
        record = records.write_ended(end, names)
        await self._room.take(max(JOB_BYTES, sum(map(len, files.values()))))
        await asyncio.gather(*(self._folder.put(name, file) for name, file in files.items()))
        created = await self._folder.write(lambda store: _create(store, job.name + _END, record))
        superfluous = [job.name + _PICTURES] if created else list(files)
        with contextlib.suppress(ApiError):  # the next removal of what has expired does it too
            await self._folder.write(partial(_remove, superfluous))
        if created:
            job.finish(end)
        return created

    async def find(self, name: str) -> LongJob | None:
        """Return a stored job; None if there is none of this name, or no longer.

        Raises:
            ApiError: 503 if the store cannot be read; 410 if a file of the job is damaged, or the
                job has not ended and is of another model.
        """
        if not SECRET_NAME.fullmatch(name):
            return None
        try:
            return await self._folder.read(partial(self._read, name))
        except DamagedRecord as error:
            text = (
                f"The job is lost: {error} is damaged in the store of the service. Start it again."
            )
            raise ApiError(410, text, code="job_lost") from error

    async def remove_expired(self, running: frozenset[str]) -> list[str]:
        """Remove the jobs that have expired; return the names of others that have not ended.

        Raises:
            ApiError: 503 if that is impossible now.
        """
        unfinished = await self._folder.write(partial(self._find_unfinished, running))
        await self._folder.write(self._folder.remove_interrupted)
        await self._room.remove_expired()
        return unfinished

    def _read(self, name: str, store: Store) -> LongJob | None:
        end_data = store.read_if_exists(name + _END)  # first: a job is removed in another order
        data = store.read_if_exists(name + _ACCEPTED)
        if data is None:
            return None
        accepted = records.read_accepted(data)
        if end_data is not None:
            ended = records.read_ended(end_data)
            if self._is_over(ended.at):
                return None
            job = LongJob(name, accepted.request(None), accepted.key)
            job.finish(self._read_end(job, ended, store))
            return job
        if self._is_over(seconds_of(name)):
            return None
        return LongJob(name, self._read_request(name, accepted, store), accepted.key)

    def _read_request(self, name: str, accepted: AcceptedRecord, store: Store) -> ImageRequest:
        """Return the images of a job to draw, with their pictures."""
        theirs, ours = accepted.encoding, self._encoding
        if (theirs.model, theirs.model_hash) != (ours.model, ours.model_hash):
            text = "The job was accepted for another model than the one served now. Start it again."
            raise ApiError(410, text, code="model_changed")
        pictures = store.read_if_exists(name + _PICTURES) if accepted.has_pictures else None
        if accepted.has_pictures and pictures is None:
            raise DamagedRecord("the file of its pictures")
        encoding = replace(theirs, software=ours.software)
        return replace(accepted, encoding=encoding).request(pictures)

    def _read_end(self, job: LongJob, ended: EndedRecord, store: Store) -> JobEnd:
        result = None
        if ended.status == "completed":
            images = tuple(
                ResultImage(image.facts, image.file if job.request.by_url else _read(image, store))
                for image in ended.images
            )
            if len(images) != len(job.request.draw_requests):
                raise DamagedRecord("the record of its end")
            result = Result(job.request, images, ended.images_created)
        return JobEnd(ended.status, result, ended.error, ended.at)

    def _is_over(self, at: float) -> bool:
        """Tell whether what happened at `at` is too long ago to be kept."""
        return at + self._keep_s < time.time()

    def _jobs(self, store: Store) -> dict[str, _Files]:
        """Return the files of all jobs, by the job's name; the oldest job first."""
        jobs: dict[str, _Files] = defaultdict(dict)
        for file, size in sorted(self._folder.names(store).items()):
            name, dot, suffix = file.partition(".")
            jobs[name][dot + suffix] = size
        return jobs

    def _find_unfinished(self, running: frozenset[str], store: Store) -> list[str]:
        """Return the names of jobs to draw; remove those that are too old, and their remains."""
        unfinished = []
        for name, files in self._jobs(store).items():
            if _END in files or name in running:
                continue
            if self._is_over(seconds_of(name)):
                self._remove_job(name, files, store)
            elif _ACCEPTED in files:
                unfinished.append(name)
        return unfinished

    def _evict(self, store: Store, most: int) -> int:
        """Remove ended jobs that are too old, then others until they take `most` bytes at most."""
        ended = {name: files for name, files in self._jobs(store).items() if _END in files}
        sizes = {name: max(JOB_BYTES, sum(files.values())) for name, files in ended.items()}
        self._ended_at = {name: at for name, at in self._ended_at.items() if name in ended}
        left = sum(sizes.values())
        for name, files in ended.items():
            if left > most or self._is_over(self._end_of(name, store)):
                self._remove_job(name, files, store)
                left -= sizes[name]
            elif _PICTURES in files:
                store.remove(name + _PICTURES)
        return left

    def _end_of(self, name: str, store: Store) -> float:
        """Return when a job ended, or an earlier time if that is late enough to keep the job."""
        accepted_at = seconds_of(name)
        if not self._is_over(accepted_at):
            return accepted_at
        if name not in self._ended_at:
            try:
                at = records.read_ended(store.read(name + _END)).at
            except DamagedRecord:
                at = accepted_at
            self._ended_at[name] = at
        return self._ended_at[name]

    def _remove_job(self, name: str, files: _Files, store: Store) -> None:
        """Remove a job: first what tells that there is one, last that it has ended."""
        first = [_ACCEPTED] if _ACCEPTED in files else []
        last = [_END] if _END in files else []
        others = [suffix for suffix in files if suffix not in (_ACCEPTED, _END)]
        for suffixes in (first, others, last):
            self._folder.remove(store, [name + suffix for suffix in suffixes])


def _create(store: Store, name: str, data: bytes) -> bool:
    """Create a file; return False if there is another one already."""
    # or ours: of two requests, the answer to the first one can be lost
    return store.create(name, data) or store.read_if_exists(name) == data


def _remove(names: list[str], store: Store) -> None:
    for name in names:
        store.remove(name)


def _read(image: EndedImage, store: Store) -> bytes:
    """Return the file of an image; raise a DamagedRecord if it is not the one that was written."""
    file = store.read_if_exists(image.file)
    if file is None or hashlib.sha256(file).hexdigest() != image.facts.sha256:
        raise DamagedRecord("an image of the job")
    return file

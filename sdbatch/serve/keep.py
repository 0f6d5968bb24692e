"""The store of `serve.keep`: long jobs and images by URL survive a restart of the Front.

    images/NAME.png    an image that is fetched by URL
    jobs/NAME...       a long job, see kept_jobs.py

Names are secrets and begin with the time at which they were made. Nothing here blocks the event
loop: all files are read and written in a few threads, and nobody waits longer than ANSWER_SECONDS.
"""

import asyncio
import contextlib
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from sdbatch.errors import JobError, StorageError
from sdbatch.job import Serve
from sdbatch.output.names import is_temporary
from sdbatch.registry import IMAGE_FORMATS
from sdbatch.serve.errors import ApiError
from sdbatch.serve.log import log
from sdbatch.serve.results import SECRET_NAME, StoredImages, seconds_of
from sdbatch.storage import Store, is_local

IMAGES, JOBS = "images", "jobs"
WRITERS, READERS, REMOVERS = (
    16,
    16,
    8,
)  # threads; many fetches without a key must not hold up writes
ANSWER_SECONDS = 60.0  # for which a request waits for the store, a large upload included
REMOVAL_SECONDS = 600.0  # that the removal of many files may take
WRITE_SECONDS = 600.0  # that no write takes
RETRY_SECONDS = 10.0  # for which the store is tried again when it fails for a moment
EVICT_TO = 0.9  # of keep_mib, so that not every new image lists the store
_IMAGE_NAME = re.compile(rf"{SECRET_NAME.pattern}\.(?:{'|'.join(IMAGE_FORMATS)})", re.ASCII)
_PROBE = f".{'0' * 32}.tmp"  # if it remains, it is removed as an interrupted write is
Value = TypeVar("Value")


def prepare(settings: Serve) -> None:
    """Create the folders of `serve.keep`, if it is set, and try them.

    Raises:
        JobError: it cannot be read and written, or others may read it.
    """
    if settings.keep is None:
        return
    for name in (IMAGES, JOBS):
        store = _store(settings.keep, name)
        try:
            if is_local(store.url):
                _make_private(store.path(""))
            store.put(_PROBE, b"")
            store.read(_PROBE)
            store.names()
            store.remove(_PROBE)
        except StorageError as error:
            found = str(error).partition(" = ")[2]
            raise JobError(f"serve.keep = {store.url}: {found}") from error
        except OSError as error:
            raise JobError(
                f"serve.keep = {store.url}: {error.strerror}: must be a folder that the service "
                f"can create and write. Choose another one, or change its permissions."
            ) from error


class KeptStore(Store):
    """A folder of the store; errors and the log show of a name only its time."""

    def where(self, name: str = "") -> str:
        """Return the full URL of `name`, as it may be shown."""
        return super().where(SECRET_NAME.sub(r"\1-...", name))


class Folder:
    """A folder of the store, whose files are read and written in threads.

    Args:
        keep: the store.
        name: IMAGES or JOBS.
    """

    def __init__(self, keep: str, name: str) -> None:
        self._store = _store(keep, name)
        self._writers = ThreadPoolExecutor(WRITERS, f"write-{name}")
        self._readers = ThreadPoolExecutor(READERS, f"read-{name}")
        self._removers = ThreadPoolExecutor(REMOVERS, f"remove-{name}")
        self._temporary: dict[str, float] = {}  # files of writes -> clock time of the first look

    async def read(self, work: Callable[[Store], Value]) -> Value:
        """Return what `work` returns, which reads files, called in a thread.

        Raises:
            ApiError: 503 if the store fails or does not answer in time.
        """
        with self._errors():
            async with asyncio.timeout(ANSWER_SECONDS):
                return await asyncio.wrap_future(self._readers.submit(work, self._store))

    async def write(
        self,
        work: Callable[[Store], Value],
        *,
        undo: Callable[[Store], None] | None = None,
        seconds: float | None = None,
    ) -> Value:
        """Return what `work` returns, which writes files, called in a thread.

        Args:
            work: writes or removes files.
            undo: is called after `work` if that fails, or if nobody waits for it any more.
            seconds: to wait; default: ANSWER_SECONDS.

        Raises:
            ApiError: 503 if the store fails or does not answer in time.
        """
        future = self._writers.submit(work, self._store)
        with self._errors():
            try:
                async with asyncio.timeout(ANSWER_SECONDS if seconds is None else seconds):
                    return await asyncio.wrap_future(future)
            except (StorageError, TimeoutError, asyncio.CancelledError):
                if undo is not None:
                    future.add_done_callback(partial(self._undo, undo))
                raise

    def _undo(self, undo: Callable[[Store], None], future: "Future[Value]") -> None:
        if not future.cancelled():  # else it has never begun
            self._writers.submit(_try, undo, self._store)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Log why the store failed, and turn that into the error response."""
        try:
            yield
        except (StorageError, TimeoutError) as error:
            found = str(error) or f"{self._store.url} = no answer in time: must be reachable."
            log.error("serve.keep: %s", found)
            raise store_unavailable() from error

    def names(self, store: Store) -> dict[str, int]:
        """Return the files that a service has written, name -> bytes."""
        return {name: size for name, size in store.names().items() if SECRET_NAME.match(name)}

    def remove(self, store: Store, names: Iterable[str]) -> None:
        """Remove files, several at a time."""
        for _ in self._removers.map(store.remove, names):
            pass

    def remove_interrupted(self, store: Store) -> None:
        """Remove what interrupted writes have left.

        A temporary file that is older than any write is of a process that was killed.
        """
        now = time.monotonic()
        temporary = filter(is_temporary, store.names())
        self._temporary = {name: self._temporary.get(name, now) for name in temporary}
        seen = self._temporary.items()
        self.remove(store, [name for name, since in seen if since + WRITE_SECONDS < now])

    async def put(self, name: str, file: bytes) -> None:
        """Store a file; raises as `write` does."""
        await self.write(lambda store: store.put(name, file))


class Room:
    """Bounds the bytes of a folder.

    Args:
        folder: the folder.
        max_bytes: what its files may take together.
        evict: removes what has expired, then the oldest files until they take some bytes at
            most; returns the bytes that are left.
    """

    def __init__(self, folder: Folder, max_bytes: int, evict: Callable[[Store, int], int]) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._evict = evict
        self._used: int | None = None  # bytes; None: not known yet
        self._taken = 0  # bytes since the start
        self._lock = asyncio.Lock()

    async def take(self, size: int) -> None:
        """Make room for `size` bytes; alone in the folder they may be more than its bound.

        Raises:
            ApiError: 503 if the store fails or does not answer in time.
        """
        try:
            async with asyncio.timeout(ANSWER_SECONDS), self._lock:
                if self._used is None or self._used + size > self._max_bytes:
                    most = max(0, int(EVICT_TO * self._max_bytes) - size)
                    self._used = await self._folder.write(lambda store: self._evict(store, most))
                self._used += size
                self._taken += size
        except TimeoutError as error:  # of the requests before this one
            raise store_unavailable() from error

    async def remove_expired(self) -> None:
        """Remove what has expired, and what another process has written too much."""
        taken_before = self._taken
        left = await self._folder.write(
            lambda store: self._evict(store, self._max_bytes), seconds=REMOVAL_SECONDS
        )
        self._used = left + self._taken - taken_before


class KeptImages(StoredImages):
    """Images by URL in the store; the oldest are evicted. Each Front finds all of them."""

    def __init__(self, folder: Folder, settings: Serve) -> None:
        self._folder = folder
        self._keep_s = settings.keep_s
        self._room = Room(folder, settings.keep_mib * 2**20, self._evict)

    async def put(self, files: Mapping[str, bytes]) -> None:
        """Store files by their names; raises an ApiError, 503, if that is impossible."""
        await self._room.take(sum(map(len, files.values())))
        await asyncio.gather(*(self._folder.put(name, file) for name, file in files.items()))

    async def fetch(self, name: str) -> bytes | None:
        """Return a file; None if there is none of this name, or no longer.

        Raises:
            ApiError: 503 if the store cannot be read.
        """
        if not _IMAGE_NAME.fullmatch(name) or self._has_expired(name):
            return None
        return await self._folder.read(lambda store: store.read_if_exists(name))

    async def remove_expired(self) -> None:
        """Remove the files that are older than `keep_s`; raises an ApiError as `fetch` does."""
        await self._folder.write(self._folder.remove_interrupted)
        await self._room.remove_expired()

    def _has_expired(self, name: str) -> bool:
        return seconds_of(name) + self._keep_s < time.time()

    def _evict(self, store: Store, most: int) -> int:
        sizes = self._folder.names(store)
        left = sum(sizes.values())
        evicted = []
        for name in sorted(sizes):  # the oldest first
            if left <= most and not self._has_expired(name):
                break
            evicted.append(name)
            left -= sizes[name]
        self._folder.remove(store, evicted)
        return left


def store_unavailable() -> ApiError:
    """Return the error of a request that needs the store while it fails."""
    text = (
        "The store of the service (serve.keep) cannot be written or read now. Retry later; the "
        "log of the service has the reason."
    )
    return ApiError(503, text, code="store_unavailable", retry_after=5)


def _store(keep: str, folder: str) -> KeptStore:
    return KeptStore(f"{keep.rstrip('/')}/{folder}", RETRY_SECONDS)


def _make_private(path: str) -> None:
    """Create a folder that only its owner may read; or make it one.

    Raises:
        JobError: others may read it, and that cannot be changed.
    """
    parent = os.path.dirname(path)
    if not os.path.isdir(parent):
        os.makedirs(parent, 0o700)
    if not os.path.isdir(path):
        os.mkdir(path, 0o700)
    if os.stat(path).st_mode & 0o077:
        with contextlib.suppress(OSError):
            os.chmod(path, 0o700)
    mode = os.stat(path).st_mode & 0o777
    if mode & 0o077:
        raise JobError(
            f"serve.keep = {path}: others may read it (mode {mode:o}): must be a folder of the "
            f"service's user alone, as prompts are in it. Run `chmod 700 {path}`."
        )


def _try(work: Callable[[Store], None], store: Store) -> None:
    with contextlib.suppress(StorageError):
        work(store)

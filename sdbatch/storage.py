"""Files on any filesystem that fsspec supports: connect, list, read, write atomically.

The only module that opens files of the output. Errors of a filesystem become a StorageError.
"""

import contextlib
import os
import posixpath
import sys
import uuid
from collections.abc import Iterator
from functools import cached_property
from typing import IO, Any

import fsspec
from fsspec.core import url_to_fs

from sdbatch.errors import StorageError, one_line

TEMPORARY = ".tmp"  # the end of a file's name while it is written
_PACKAGES = {  # by the protocol that needs one
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "abfs": "adlfs",
    "az": "adlfs",
    "abfss": "adlfs",
    "hf": "huggingface_hub",
}


@contextlib.contextmanager
def storage_errors(where: str) -> Iterator[None]:
    """Turn a filesystem's error in the block into a StorageError that begins with `where`."""
    try:
        yield
    except _error_types() as error:
        raise StorageError(f"{where} = {_describe(error)}") from error


def connect(url: str) -> tuple[Any, str]:
    """Return the fsspec filesystem of `url` and the path in it; local paths become absolute.

    Raises:
        StorageError: the protocol is unknown, or its package is not installed; names the package.
    """
    protocol = url.partition("://")[0]
    try:
        with storage_errors(url):
            fs, path = url_to_fs(url)
    except ImportError as error:
        fix = f"pip install {_PACKAGES[protocol]}" if protocol in _PACKAGES else str(error)
        raise StorageError(
            f"{url} = {protocol}:// needs a package that is missing: {fix}."
        ) from error
    except ValueError as error:
        raise StorageError(
            f"{url} = {error}: must be a local path or a URL that fsspec supports."
        ) from error
    return fs, path


@contextlib.contextmanager
def open_file(url: str, compression: str | None = None) -> Iterator[IO[bytes]]:
    """Open `url` for reading bytes; `compression` is fsspec's: "infer" uses the suffix."""
    fs, path = connect(url)
    with (
        storage_errors(url),
        fsspec.core.OpenFile(fs, path, compression=_compression(path, compression)) as file,
    ):
        yield file


def is_local(url: str) -> bool:
    """Return whether `url` is a path of this machine."""
    return "://" not in url or url.startswith(("file://", "local://"))


class Store:
    """A folder on any filesystem; names are relative to it, with `/` between the parts."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/") if "://" in url else os.path.abspath(os.path.expanduser(url))

    @cached_property
    def _connection(self) -> tuple[Any, str]:
        return connect(self.url)

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the URL alone: each process opens its own connection."""
        return {"url": self.url}

    def where(self, name: str = "") -> str:
        """Return the full URL of `name`."""
        return posixpath.join(self.url, name) if name else self.url

    def path(self, name: str) -> str:
        """Return the path of `name` in the filesystem."""
        return posixpath.join(self._connection[1], name) if name else self._connection[1]

    def check_writable(self) -> None:
        """Raise a StorageError if a local folder cannot be created or written to."""
        if not is_local(self.url):
            self._connection  # noqa: B018  raises for a protocol that is unknown or not installed
            return
        path = self.path("")
        while not os.path.exists(path):
            path = os.path.dirname(path)
        if not os.path.isdir(path):
            raise StorageError(f"output.path = {self.url}: {path} is a file, must be a folder.")
        if not os.access(path, os.W_OK | os.X_OK):
            raise StorageError(f"output.path = {self.url}: must be writable, but {path} is not.")

    def read(self, name: str) -> bytes:
        """Return the bytes of `name`; raise a StorageError if there is no such file."""
        with storage_errors(self.where(name)):
            return bytes(self._connection[0].cat_file(self.path(name)))

    def read_if_exists(self, name: str) -> bytes | None:
        """Return the bytes of `name`, or None if there is no such file."""
        fs, _ = self._connection
        with storage_errors(self.where(name)):
            try:
                return bytes(fs.cat_file(self.path(name)))
            except (FileNotFoundError, NotADirectoryError):
                return None

    def put(self, name: str, data: bytes) -> None:
        """Write `data` at `name` atomically: readers see all of it or nothing.

        Not `with fs.open(name, "wb")`: when an exception leaves that block, fsspec closes the
        file and so commits the half of it that was written. A local file is written under a
        temporary name in the same folder, synced to disk and renamed; an object store commits one
        upload as a whole.
        """
        fs, _ = self._connection
        path = self.path(name)
        with storage_errors(self.where(name)):
            if not is_local(self.url):
                fs.pipe_file(path, data)
                return
            folder = os.path.dirname(path)
            os.makedirs(folder, exist_ok=True)
            temporary = os.path.join(folder, f".{uuid.uuid4().hex}{TEMPORARY}")
            try:
                with open(temporary, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, path)
                _sync_folder(folder)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.remove(temporary)
                raise

    def names(self, folder: str = "") -> dict[str, int]:
        """Return the files directly in `folder`, name -> size in bytes, hidden files included."""
        fs, _ = self._connection
        with storage_errors(self.where(folder)):
            fs.invalidate_cache()
            try:
                entries = fs.ls(self.path(folder), detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return {}
        return {
            posixpath.basename(entry["name"]): entry["size"] or 0
            for entry in entries
            if entry["type"] == "file" and posixpath.basename(entry["name"])
        }

    def remove(self, name: str) -> None:
        """Remove the file `name` if it exists."""
        with storage_errors(self.where(name)), contextlib.suppress(FileNotFoundError):
            self._connection[0].rm_file(self.path(name))

    def remove_if_empty(self, folder: str = "") -> None:
        """Remove `folder` if it is local and empty; an object store has no folders."""
        if is_local(self.url):
            with contextlib.suppress(OSError):
                os.rmdir(self.path(folder))

    def open(self, name: str) -> Any:
        """Open `name` for reading at any position, as a binary file."""
        with storage_errors(self.where(name)):
            return self._connection[0].open(self.path(name), "rb")


def _sync_folder(path: str) -> None:
    """Sync a folder's names to disk: after a power loss no receipt may exist without its data."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _compression(path: str, setting: str | None) -> str | None:
    name: str | None = fsspec.core.get_compression(path, setting)
    return name


def _error_types() -> tuple[type[BaseException], ...]:
    """Return the errors of filesystems and of the network clients in use; not all are OSErrors."""
    types: list[type[BaseException]] = [OSError, NotImplementedError]
    for module, name in (("botocore.exceptions", "BotoCoreError"), ("aiohttp", "ClientError")):
        if module in sys.modules:
            types.append(getattr(sys.modules[module], name))
    return tuple(types)


def _describe(error: BaseException) -> str:
    """Return what happened, what must hold, and the way out."""
    text = getattr(error, "strerror", None) or one_line(error) or type(error).__name__
    remedies = {
        FileNotFoundError: "must be there. Check the path.",
        NotImplementedError: "must be a writable filesystem. Choose another one.",
        PermissionError: "must be readable, an output also writable. Check permissions and keys.",
    }
    for kind, remedy in remedies.items():
        if isinstance(error, kind):
            return f"{text}: {remedy}"
    return (
        f"{text}: must be reachable and have space left. Fix that, then run the same command again."
    )

"""Files on any filesystem that fsspec knows: open a folder, list, read, put whole or not at all.

The only module that opens files of the output; what a store raises becomes a StorageError.
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

from sdbatch.errors import StorageError

TEMPORARY = ".tmp"
_FAULTS = (OSError, NotImplementedError)  # of a filesystem
_PACKAGES = {
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "abfs": "adlfs",
    "az": "adlfs",
    "abfss": "adlfs",
    "hf": "huggingface_hub",
}


class errors:
    """Turns what a filesystem raises in the block into a StorageError that begins with `where`."""

    def __init__(self, where: str) -> None:
        self._where = where

    def __enter__(self) -> None:
        """Begin the block."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Raise the StorageError, if the block ended with a fault of the store or the network."""
        if error is not None and isinstance(error, (*_FAULTS, *_client_errors())):
            raise StorageError(f"{self._where} = {_reason(error)}") from error


def connect(url: str) -> tuple[Any, str]:
    """Return the fsspec filesystem of `url` and the path in it; local paths become absolute.

    Raises:
        StorageError: the protocol is not known, or its package is not installed (it is named).
    """
    protocol = url.partition("://")[0]
    try:
        with errors(url):
            fs, path = url_to_fs(url)
    except ImportError as error:
        way = f"pip install {_PACKAGES[protocol]}" if protocol in _PACKAGES else str(error)
        raise StorageError(
            f"{url} = {protocol}:// needs a package that is missing: {way}."
        ) from error
    except ValueError as error:
        raise StorageError(
            f"{url} = {error}: must be a local path or a URL fsspec knows."
        ) from error
    return fs, path


@contextlib.contextmanager
def open_file(url: str, compression: str | None = None) -> Iterator[IO[bytes]]:
    """Open `url` for reading bytes; `compression` as in fsspec, "infer" goes by the suffix."""
    fs, path = connect(url)
    with (
        errors(url),
        fsspec.core.OpenFile(fs, path, compression=_compression(path, compression)) as file,
    ):
        yield file


def is_local(url: str) -> bool:
    """Tell whether `url` is a path of this machine."""
    return "://" not in url or url.startswith(("file://", "local://"))


class Store:
    """A folder of an output; names are relative to it, with `/` between the parts."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/") if "://" in url else os.path.abspath(os.path.expanduser(url))

    @cached_property
    def _connection(self) -> tuple[Any, str]:
        return connect(self.url)

    def __getstate__(self) -> dict[str, Any]:
        """Travel as the URL alone: each process connects for itself."""
        return {"url": self.url}

    def where(self, name: str = "") -> str:
        """Return the full URL of `name`."""
        return posixpath.join(self.url, name) if name else self.url

    def path(self, name: str) -> str:
        """Return `name` as the filesystem writes it."""
        return posixpath.join(self._connection[1], name) if name else self._connection[1]

    def check_writable(self) -> None:
        """Raise a StorageError where a local folder plainly cannot be made or written in."""
        if not is_local(self.url):
            self._connection  # noqa: B018  a protocol that is not known or not installed
            return
        path = self.path("")
        while not os.path.exists(path):
            path = os.path.dirname(path)
        if not os.path.isdir(path):
            raise StorageError(f"output.path = {self.url}: {path} is a file, it must be a folder.")
        if not os.access(path, os.W_OK | os.X_OK):
            raise StorageError(f"output.path = {self.url}: must be writable, and {path} is not.")

    def read(self, name: str) -> bytes:
        """Return the bytes of `name`; a StorageError if there is no such file."""
        with errors(self.where(name)):
            return bytes(self._connection[0].cat_file(self.path(name)))

    def find(self, name: str) -> bytes | None:
        """Return the bytes of `name`, or None if there is no such file."""
        fs, _ = self._connection
        with errors(self.where(name)):
            try:
                return bytes(fs.cat_file(self.path(name)))
            except (FileNotFoundError, NotADirectoryError):
                return None

    def put(self, name: str, data: bytes) -> None:
        """Write `data` at `name` whole or not at all.

        Not `with fs.open(name, "wb")`: when an exception leaves that block, fsspec closes the
        file and so commits the half of it that was written. A local file is written beside its
        place, forced to disk and renamed; an object store shows one upload whole or not at all.
        """
        fs, _ = self._connection
        path = self.path(name)
        with errors(self.where(name)):
            if not is_local(self.url):
                fs.pipe_file(path, data)
                return
            os.makedirs(os.path.dirname(path), exist_ok=True)
            beside = os.path.join(os.path.dirname(path), f".{uuid.uuid4().hex}{TEMPORARY}")
            try:
                with open(beside, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(beside, path)
                _sync_folder(os.path.dirname(path))
            except BaseException:
                with contextlib.suppress(OSError):
                    os.remove(beside)
                raise

    def names(self, folder: str = "") -> dict[str, int]:
        """Return the files directly in `folder`, hidden ones too, and their sizes in bytes."""
        fs, _ = self._connection
        with errors(self.where(folder)):
            fs.invalidate_cache()
            try:
                found = fs.ls(self.path(folder), detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return {}
        return {
            posixpath.basename(entry["name"]): entry["size"] or 0
            for entry in found
            if entry["type"] == "file" and posixpath.basename(entry["name"])
        }

    def remove(self, name: str) -> None:
        """Remove the file `name` if it is there."""
        with errors(self.where(name)), contextlib.suppress(FileNotFoundError):
            self._connection[0].rm_file(self.path(name))

    def remove_if_empty(self, folder: str = "") -> None:
        """Remove `folder` if it is local and nothing is in it; an object store has no folders."""
        if is_local(self.url):
            with contextlib.suppress(OSError):
                os.rmdir(self.path(folder))

    def open(self, name: str) -> Any:
        """Open `name` for reading at any position."""
        with errors(self.where(name)):
            return self._connection[0].open(self.path(name), "rb")


def _sync_folder(path: str) -> None:
    """Force a folder's names to disk: a receipt must not outlive its data in a loss of power."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _compression(path: str, wanted: str | None) -> str | None:
    found: str | None = fsspec.core.get_compression(path, wanted)
    return found


def _client_errors() -> tuple[type[BaseException], ...]:
    """Return the base errors of the network clients that are loaded: not all are OSErrors."""
    found: list[type[BaseException]] = []
    for module, name in (("botocore.exceptions", "BotoCoreError"), ("aiohttp", "ClientError")):
        if module in sys.modules:
            found.append(getattr(sys.modules[module], name))
    return tuple(found)


def _reason(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
    ways = {
        FileNotFoundError: "must be there. Check the path.",
        NotImplementedError: "must be a filesystem that can be written.",
        PermissionError: "must be readable, an output writable. Check permissions and keys.",
    }
    for kind, way in ways.items():
        if isinstance(error, kind):
            return f"{text}: {way}"
    return f"{text}: must be within reach, with space left. Run the same command again when it is."

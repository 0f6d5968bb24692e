"""Files on any filesystem that fsspec supports: connect, list, read, write atomically.

The only module that opens files of the output. Errors of a filesystem become a StorageError.
"""

import contextlib
import errno
import os
import posixpath
import sys
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import IO, Any, TypeVar
from urllib.parse import urlsplit

import fsspec
from fsspec.core import url_to_fs
from fsspec.exceptions import FSTimeoutError

from sdbatch import local_files
from sdbatch.errors import StorageError, one_line
from sdbatch.retries import try_again
from sdbatch.urls import FOLDER, names_folder, without_secrets

_T = TypeVar("_T")
ANSWER_SECONDS = 60  # for which an object store may be silent
FILE_SECONDS = 20  # for which one of many files is tried again
SLOWEST_UPLOAD = 100_000  # bytes a second; a slower upload is sent again, then given up
_EXTRAS = {"gs": "gcs", "gcs": "gcs", "az": "azure", "abfs": "azure", "abfss": "azure"}
_CLIENT_ERRORS: dict[tuple[str, str], type[OSError]] = {  # not OSErrors; what each means
    ("botocore.exceptions", "NoCredentialsError"): PermissionError,
    ("botocore.exceptions", "BotoCoreError"): OSError,
    ("botocore.parsers", "ResponseParserError"): OSError,  # a page of a proxy instead of XML
    ("aiohttp", "ClientError"): OSError,
    ("azure.core.exceptions", "ClientAuthenticationError"): PermissionError,
    ("azure.core.exceptions", "ResourceNotFoundError"): FileNotFoundError,
    ("azure.core.exceptions", "AzureError"): OSError,
    ("google.auth.exceptions", "GoogleAuthError"): PermissionError,
    ("gcsfs.retry", "HttpError"): OSError,
}
_PASSING = (errno.EBUSY, getattr(errno, "EREMOTEIO", errno.EIO))  # s3fs': SlowDown, 5xx
_REMEDY = "must be reachable and have space left. Fix that, then run the same command again."
_KEYS_IN_ENVIRONMENT = ("s3", "s3a", "gs", "gcs")  # of these protocols


@contextlib.contextmanager
def storage_errors(where: str, remedy: str = _REMEDY) -> Iterator[None]:
    """Turn a filesystem's error in the block into a StorageError that begins with `where`.

    `remedy` is what must hold, and the way out, of an error that does not say it.
    The filesystem's error stays its cause, unless that holds the secrets of a URL: Ray logs causes.
    """
    try:
        yield
    except _error_types() as error:
        cause = None if _holds_secrets(error) else error
        raise StorageError(f"{where} = {_describe(error, remedy)}") from cause


def connect(url: str) -> tuple[Any, str]:
    """Return the fsspec filesystem of `url` and the path in it; local paths become absolute.

    Raises:
        StorageError: the protocol is unknown, or its package is not installed; names the package.
            Or there are keys in the URL of an object store, which no such package reads.
    """
    protocol = url.partition("://")[0]
    if protocol.rpartition("::")[2] in _KEYS_IN_ENVIRONMENT and without_secrets(url) != url:
        raise StorageError(
            f"{url} = access keys in the URL: must be in the environment, such as "
            f"AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or in a profile. A signed URL begins "
            f"with https://."
        )
    try:
        if protocol in ("http", "https"):
            _check_host(url)
        with storage_errors(url):
            fs, path = url_to_fs(url, **_timeouts(protocol))
        if protocol in ("s3", "s3a"):
            fs.retries = 1  # not five times: retries.py sends again, and knows when to end
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        fix = f'pip install "sdbatch[{extra}]"' if extra else str(error)
        raise StorageError(
            f"{url} = {protocol}:// needs a package that is missing: {fix}."
        ) from error
    except ValueError as error:
        raise StorageError(
            f"{url} = {error}: must be a local path, or a URL that fsspec supports with its "
            f"settings (docs/commands.md)."
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


def read_whole(url: str, read: Callable[[Any, str], bytes]) -> bytes:
    """Return what `read` returns for the filesystem of `url` and the path in it.

    It is called again for a short time, as there may be many files, if the filesystem is remote
    and fails for a moment.

    Raises:
        StorageError: the file cannot be read.
    """
    fs, path = connect(url)
    with storage_errors(url, "must be reachable. Check the address."):
        if is_local(url):
            return read(fs, path)
        return try_again(url, lambda: read(fs, path), _passes, FILE_SECONDS)


def is_local(url: str) -> bool:
    """Return whether `url` is a path of this machine."""
    return "://" not in url or url.startswith(("file://", "local://"))


def location(url: str) -> tuple[str, ...]:
    """Return where a file or folder is: its protocol, then the folders, links followed.

    It is inside another if its location begins with that of the other.
    """
    return _location(*connect(url.rpartition("::")[2]))


class Store:
    """A folder on any filesystem; names are relative to it, with `/` between the parts.

    Args:
        url: of the folder.
        retry_seconds: for which a request that fails for a moment is sent again; default:
            retries.BUDGET_SECONDS.
    """

    def __init__(self, url: str, retry_seconds: float | None = None) -> None:
        self._retry_seconds = retry_seconds
        if not names_folder(url):
            raise StorageError(f"{url!r} = names no folder: must be {FOLDER}.")
        local = "://" not in url
        self._address = os.path.abspath(os.path.expanduser(url)) if local else url.rstrip("/")
        self.url = self._address if local else without_secrets(self._address)  # to be shown

    @cached_property
    def _connection(self) -> tuple[Any, str]:
        return connect(self._address)

    def _ask(self, name: str, request: Callable[[Any], _T]) -> _T:
        """Send a request to the filesystem; again if it is remote and fails for a moment."""
        fs, _ = self._connection
        if is_local(self.url):
            return request(fs)
        return try_again(self.where(name), lambda: request(fs), _passes, self._retry_seconds)

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the URL alone: each process opens its own connection."""
        names = ("_address", "url", "_retry_seconds")
        return {name: getattr(self, name) for name in names}

    def where(self, name: str = "") -> str:
        """Return the full URL of `name`, as it may be shown."""
        return posixpath.join(self.url, name) if name else self.url

    @property
    def location(self) -> tuple[str, ...]:
        """Return where the folder is, as the function `location` does for a URL."""
        return _location(*self._connection)

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
            return self._ask(name, lambda fs: _download(fs, self.path(name)))

    def read_if_exists(self, name: str) -> bytes | None:
        """Return the bytes of `name`, or None if there is no such file."""
        with storage_errors(self.where(name)):
            try:
                return self._ask(name, lambda fs: _download(fs, self.path(name)))
            except (FileNotFoundError, NotADirectoryError):
                return None

    def begin(self) -> None:
        """Create the folder, if it is local; an object store has no folders."""
        if is_local(self.url):
            with storage_errors(self.url):
                os.makedirs(self.path(""), exist_ok=True)

    def create(self, name: str, data: bytes) -> bool:
        """Write `data` at `name` unless there is such a file; return whether it was written.

        Of several processes that try at the same time, one writes: local filesystems have links,
        object stores a write on condition. Readers see all of the file or nothing.
        """
        path = self.path(name)
        with storage_errors(self.where(name)):
            if not is_local(self.url):
                return self._ask(name, lambda fs: _create_object(fs, path, data))
            folder = os.path.dirname(path)
            local_files.make_folder(folder, self.path(""))
            with local_files.temporary_file(folder, data) as temporary:
                created = local_files.link(temporary, path)
                os.remove(temporary)
            local_files.sync_folder(folder)
        return created

    def put(self, name: str, data: bytes | memoryview) -> None:
        """Write `data` at `name` atomically: readers see all of it or nothing.

        The output's own folder must exist: one that was moved away is not created again.

        Not `with fs.open(name, "wb")`: when an exception leaves that block, fsspec closes the
        file and so commits the half of it that was written. A local file is written under a
        temporary name in the same folder, synced to disk and renamed; an object store commits one
        upload as a whole.
        """
        path = self.path(name)
        with storage_errors(self.where(name)):
            if not is_local(self.url):
                whole = bytes(data)  # clients of object stores send no other type
                self._ask(name, lambda fs: _upload(fs, path, whole))
                return
            folder = os.path.dirname(path)
            local_files.make_folder(folder, self.path(""))
            with local_files.temporary_file(folder, data) as temporary:
                os.replace(temporary, path)
                local_files.sync_folder(folder)

    def names(self, folder: str = "") -> dict[str, int]:
        """Return the files directly in `folder`, name -> size in bytes, hidden files included.

        Links count as the files that they lead to: tools for large datasets replace files by links.
        """
        with storage_errors(self.where(folder)):
            if is_local(self.url):
                return _local_names(self.path(folder))
            return self._ask(folder, lambda fs: _object_names(fs, self.path(folder)))

    def remove(self, name: str) -> None:
        """Remove the file `name` if it exists."""
        with storage_errors(self.where(name)), contextlib.suppress(FileNotFoundError):
            self._ask(name, lambda fs: fs.rm_file(self.path(name)))

    def remove_if_empty(self, folder: str = "") -> None:
        """Remove `folder` if it is local and empty; an object store has no folders."""
        if is_local(self.url):
            with contextlib.suppress(OSError):
                os.rmdir(self.path(folder))

    def open(self, name: str) -> Any:
        """Open `name` for reading at any position, as a binary file."""
        fs, _ = self._connection
        with storage_errors(self.where(name)):
            fs.invalidate_cache()  # of sizes: another process may have replaced the file
            return fs.open(self.path(name), "rb")


def _timeouts(protocol: str) -> dict[str, Any]:
    """Return options by which a server that never answers is given up after minutes, not hours.

    botocore by default sends each request five times.
    """
    if protocol in ("http", "https"):
        import aiohttp

        client = fsspec.config.conf.get(protocol, {}).get("client_kwargs", {})
        timeout = aiohttp.ClientTimeout(300, sock_connect=20, sock_read=ANSWER_SECONDS)
        return {"client_kwargs": {"timeout": timeout, **client}}
    if protocol not in ("s3", "s3a"):
        return {}
    own = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
    timeouts = {"connect_timeout": 20, "read_timeout": ANSWER_SECONDS}
    return {"config_kwargs": {**timeouts, "retries": {"max_attempts": 0}, **own}}


def _check_host(url: str) -> None:
    """Raise a ValueError if a URL has no host, or a port that cannot be."""
    parts = urlsplit(url)
    if not parts.hostname or parts.port == 0:
        raise ValueError("no host")


def _location(fs: Any, path: str) -> tuple[str, ...]:
    protocols = (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)
    if "file" in protocols:
        path = os.path.realpath(path)
    return (protocols[0], *(part for part in path.split("/") if part not in ("", ".")))


def _local_names(path: str) -> dict[str, int]:
    try:
        entries = list(os.scandir(path))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    found = {}
    for entry in entries:
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile, or a link to nothing
            if entry.is_file():
                found[entry.name] = entry.stat().st_size
    return found


def _object_names(fs: Any, path: str) -> dict[str, int]:
    fs.invalidate_cache()
    try:
        entries = fs.ls(path, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    if any(entry["name"] == path and entry["type"] == "file" for entry in entries):
        # `path` is a file; or adlfs shows only the empty object that marks a folder
        below = {} if fs.isfile(path) else fs.find(path, detail=True)
        entries = [entry for name, entry in below.items() if posixpath.dirname(name) == path]
    return {
        posixpath.basename(entry["name"]): entry["size"] or 0
        for entry in entries
        if entry["type"] == "file" and posixpath.basename(entry["name"])
    }


def _download(fs: Any, path: str) -> bytes:
    """Read a file in one request.

    Else s3fs sends another one first, for its size, whose errors have no text.
    """
    options = {"max_concurrency": 1} if "s3" in fs.protocol else {}
    return bytes(fs.cat_file(path, **options))


def _upload(fs: Any, path: str, data: bytes, **options: Any) -> None:
    """Write an object.

    The clients count the seconds without an answer only when the whole request is sent, and S3's
    waits before that until the server wants the object: without a timeout here it may never end.

    Raises:
        TimeoutError: it takes longer than a slow network needs.
    """
    if not getattr(fs, "async_impl", False):
        fs.pipe_file(path, data, **options)
        return
    seconds = ANSWER_SECONDS + len(data) / SLOWEST_UPLOAD
    try:
        fs.pipe_file(path, data, timeout=seconds, **options)
    except FSTimeoutError as error:  # without a text
        raise TimeoutError(f"not written in {seconds:.0f} s") from error


def _create_object(fs: Any, path: str, data: bytes, attempts: int = 10) -> bool:
    """Create an object on condition that it does not exist; return whether it was created."""
    try:
        _upload(fs, path, data, mode="create")
    except FileExistsError:
        return False
    except OSError as error:  # s3fs knows the full answer of AWS alone
        code = getattr(error.__cause__, "response", {}).get("Error", {}).get("Code")
        if code == "ConditionalRequestConflict" and attempts > 1:  # S3: others are writing it
            return _create_object(fs, path, data, attempts - 1)
        if code != "PreconditionFailed":
            raise
        return False
    return True


def _compression(path: str, setting: str | None) -> str | None:
    path = path.partition("?")[0] if "://" in path else path  # a URL may have a query
    name: str | None = fsspec.core.get_compression(path, setting)
    return name


def _client_errors() -> dict[type[BaseException], type[OSError]]:
    """Return the errors of the network clients in use, and the OSError that each means."""
    found = {  # another thread may be importing a module
        getattr(sys.modules.get(module), name, None): meaning
        for (module, name), meaning in _CLIENT_ERRORS.items()
    }
    return {kind: meaning for kind, meaning in found.items() if kind is not None}


def _error_types() -> tuple[type[BaseException], ...]:
    return (OSError, NotImplementedError, *_client_errors())


def _meaning(error: BaseException) -> type[BaseException]:
    """Return the type of error that decides what must hold."""
    if _status(error) in (401, 403):
        return PermissionError
    for kind, meaning in _client_errors().items():
        if isinstance(error, kind):
            return meaning
    return type(error)


def _status(error: BaseException) -> Any:
    """Return the status of an HTTP answer; the names are Azure's, gcsfs's and aiohttp's."""
    values = vars(error)
    return values.get("status_code") or values.get("code") or values.get("status")


def _passes(error: BaseException) -> bool:
    """Tell whether an error of a remote filesystem passes by itself: the network, a busy server."""
    meaning, status = _meaning(error), _status(error)
    if issubclass(meaning, PermissionError | FileNotFoundError | FileExistsError):
        return False
    if isinstance(status, int):
        return status == 429 or status >= 500
    if type(error) is OSError:
        return error.errno in _PASSING
    return isinstance(error, (TimeoutError, ConnectionError, *_client_errors()))


def _holds_secrets(error: BaseException | None) -> bool:
    """Tell whether the text of an error, or of one that led to it, holds the secrets of a URL."""
    while error is not None:
        text = f"{error} {error.args}"
        if without_secrets(text) != text:
            return True
        error = error.__cause__ or error.__context__
    return False


def _describe(error: BaseException, otherwise: str) -> str:
    """Return what happened, what must hold, and the way out."""
    message = str(error)
    if type(error).__module__.startswith("azure."):  # the rest is a page for Azure's support
        message = message.partition("\n")[0]
    text = getattr(error, "strerror", None) or one_line(message) or type(error).__name__
    remedies = {
        FileNotFoundError: "must be there. Check the path.",
        NotImplementedError: "must be a writable filesystem. Choose another one.",
        PermissionError: "must be readable, an output also writable. Check permissions and keys.",
    }
    for kind, remedy in remedies.items():
        if issubclass(_meaning(error), kind):
            return f"{text}: {remedy}"
    return f"{text}: {otherwise}"

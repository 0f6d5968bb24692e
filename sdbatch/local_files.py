"""Files of this machine's disks: created or replaced as a whole, and safe after a power loss."""

import contextlib
import errno
import os
import uuid
from collections.abc import Iterator
from typing import Literal

TEMPORARY = ".tmp"  # the end of a file's name while it is written
_NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK)  # of a filesystem


def make_folder(path: str, root: str) -> None:
    """Create a folder in `root` if it is missing, but not `root` itself."""
    if path != root:
        with contextlib.suppress(FileExistsError):
            os.mkdir(path)


@contextlib.contextmanager
def temporary_file(folder: str, data: bytes | memoryview) -> Iterator[str]:
    """Write a file of a temporary name to disk; remove it if the block fails."""
    path = os.path.join(folder, f".{uuid.uuid4().hex}{TEMPORARY}")
    try:
        _write_file(path, data, "wb")
        yield path
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(path)
        raise


def _write_file(path: str, data: bytes | memoryview, mode: Literal["wb", "xb"]) -> None:
    with open(path, mode) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def link(source: str, path: str) -> bool:
    """Give the file `source` a second name unless there is such a file; return whether it has it.

    Not O_EXCL, as others would see the file before it has content: that is for filesystems
    without links.
    """
    try:
        try:
            os.link(source, path)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            with open(source, "rb") as file:
                _write_file(path, file.read(), "xb")
    except FileExistsError:
        return False
    return True


def sync_folder(path: str) -> None:
    """Sync a folder's names to disk: after a power loss no receipt may exist without its data."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

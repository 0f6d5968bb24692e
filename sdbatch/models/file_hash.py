"""The sha256 of a file, read once on a machine: weights are large, and each process proves its own.

A cached hash is of a file of the same path, inode, size and time of its last change.
"""

import contextlib
import hashlib
from pathlib import Path

from sdbatch import cache


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file in hexadecimal digits.

    Raises:
        OSError: the file cannot be read.
    """
    cached = cache.folder("sha256") / _identity(path)
    with contextlib.suppress(OSError):
        known = cached.read_text()
        if len(known) == 64:
            return known
    with path.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    with contextlib.suppress(OSError):  # a cache that cannot be written saves no time
        cache.write(cached, found)
    return found


def _identity(path: Path) -> str:
    stat = path.stat()
    identity = [str(path.resolve()), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns]
    return hashlib.sha256(repr(identity).encode()).hexdigest()

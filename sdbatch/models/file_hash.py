"""The sha256 of a file, read once on a machine: weights are large, and each process proves its own.

A cached hash is of a file of the same path, inode, size and time of its last change.
"""

import contextlib
import hashlib
import os
import uuid
from pathlib import Path


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file in hexadecimal digits.

    Raises:
        OSError: the file cannot be read.
    """
    cached = _cache_folder() / _identity(path)
    with contextlib.suppress(OSError):
        known = cached.read_text()
        if len(known) == 64:
            return known
    with path.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    with contextlib.suppress(OSError):  # a cache that cannot be written saves no time
        cached.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        temporary = cached.with_name(f"{cached.name}.{uuid.uuid4().hex}")
        temporary.write_text(found)
        temporary.replace(cached)
    return found


def _identity(path: Path) -> str:
    stat = path.stat()
    identity = [str(path.resolve()), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns]
    return hashlib.sha256(repr(identity).encode()).hexdigest()


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "sdbatch" / "sha256"

"""Which logs stay on a machine: those of living runs and of the last few.

A run holds a lock on a file, and so do the processes that inherit the file. A file that nobody has
locked is of a run that is over.
"""

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

KEPT = 5  # runs that are over


def log_folder() -> str:
    """Return a folder of this user's own, in which all files are logs of sdbatch's commands."""
    folder = os.path.join(tempfile.gettempdir(), f"sdbatch-{os.getuid()}")
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder, mode=0o700)
    if os.path.islink(folder) or os.stat(folder).st_uid != os.getuid():  # somebody else's
        return tempfile.mkdtemp(prefix="sdbatch-")
    return folder


def lock(descriptor: int) -> None:
    """Lock an open file, for as long as this process or one that inherits it has it open."""
    with contextlib.suppress(OSError):  # a filesystem without locks: its files stay
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def of_old_runs(files: Iterable[Path]) -> list[Path]:
    """Return those locked files whose run is over, without those of the KEPT newest runs."""
    over = {}
    for file in files:
        with contextlib.suppress(OSError):
            if _is_over(file):
                over[file] = file.stat().st_mtime
    return sorted(over, key=lambda file: over[file], reverse=True)[KEPT:]


def _is_over(file: Path) -> bool:
    descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return os.fstat(descriptor).st_uid == os.getuid()
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)

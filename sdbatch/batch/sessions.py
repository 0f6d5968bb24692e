"""The folders of the Rays that runs start, with Ray's logs: those of the last few runs stay."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from sdbatch import retention

MARK = "sdbatch.lock"  # in the folder of a Ray that a run of sdbatch started, and no other


@contextlib.contextmanager
def marked(folder: Path) -> Iterator[None]:
    """Mark the folder of a Ray as that of a run that lives; remove those of old runs."""
    marks = (each / MARK for each in folder.parent.glob("session_*") if not each.is_symlink())
    for mark in retention.of_old_runs(marks):
        shutil.rmtree(mark.parent, ignore_errors=True)
    descriptor = os.open(folder / MARK, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        retention.lock(descriptor)
        yield
    finally:
        os.close(descriptor)

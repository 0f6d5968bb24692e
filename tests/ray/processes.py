"""A Ray that a command starts: its files in a folder of its own, and its processes."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def ray_files() -> Iterator[Path]:
    """Make a folder for Ray's files; its path is short, as those of Ray's sockets are limited."""
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def marked(folder: Path) -> dict[str, str]:
    """Return an environment in which a Ray keeps its files in `folder`."""
    return {**os.environ, "RAY_TMPDIR": str(folder)}


def find_process(folder: Path, title: str) -> int | None:
    """Return the process of the Ray in `folder` whose title contains `title`."""
    mark = f"RAY_TMPDIR={folder}\0".encode()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes()
            titled = command.startswith(b"ray::") and title.encode() in command
            if titled and mark in (entry / "environ").read_bytes():
                return int(entry.name)
        except OSError:  # it has ended, or is not ours
            continue
    return None

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


def processes(mark: str) -> dict[int, str]:
    """Return the processes whose environment has `mark`, a NAME=value: their commands by id."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if f"{mark}\0".encode() in (entry / "environ").read_bytes():
                found[int(entry.name)] = (entry / "cmdline").read_bytes().decode(errors="replace")
        except OSError:  # it has ended, or is not ours
            continue
    return found


def find_process(folder: Path, title: str) -> int | None:
    """Return the process of the Ray in `folder` whose title contains `title`."""
    for pid, command in processes(f"RAY_TMPDIR={folder}").items():
        if command.startswith("ray::") and title in command:
            return pid
    return None

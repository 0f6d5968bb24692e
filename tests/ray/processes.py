"""A Ray that a command starts: its files in a folder of its own, and its processes."""

import os
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
    return next(iter(find_processes(folder, title)), None)


def find_processes(folder: Path, title: str) -> list[int]:
    """Return all processes of the Ray in `folder` whose title contains `title`."""
    found = processes(f"RAY_TMPDIR={folder}").items()
    return [pid for pid, command in found if command.startswith("ray::") and title in command]


def free_port() -> int:
    """Return a TCP port of this machine that nothing listens at now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def kill_all(folder: Path) -> None:
    """Kill all processes of the Ray in `folder`, also those that are started meanwhile."""
    while found := processes(f"RAY_TMPDIR={folder}"):
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)

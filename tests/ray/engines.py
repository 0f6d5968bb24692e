"""Fake engines of the tests with a Ray; here, so that a process that draws imports no more."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np

from sdbatch.errors import ModelError
from tests.fakes import FakeEngine
from tests.wait import wait_until


class Together(FakeEngine):
    """Draws when every prompt is there, and all but the first when progress was shown.

    Processes tell each other by the files in a folder.
    """

    def __init__(self, folder: Path, prompts: int) -> None:
        super().__init__()
        self._folder, self._prompts = folder, prompts

    def submit(self, request):
        (self._folder / request.prompt).touch()
        return super().submit(request)

    def _draw(self, request):
        wait_until(lambda: len(list(self._folder.glob("dog *"))) == self._prompts)
        if self.usage.ticks:
            wait_until((self._folder / "shown").exists)
        return super()._draw(request)


class Tolerant(FakeEngine):
    """Draws what FakeEngine dies of."""

    def submit(self, request):
        return super().submit(request.updated(prompt="anything"))


class Known(FakeEngine):
    """Writes its process id to a file of a folder, and takes a moment for an image."""

    def __init__(self, folder: Path) -> None:
        super().__init__(delay=0.4)
        (folder / str(os.getpid())).touch()


class Held(FakeEngine):
    """Draws noise, too much for Ray to send it with a message; waits for a file before an image.

    Args:
        go: the file.
        free: the number in the prompt from which on it waits.
    """

    def __init__(self, go: Path, free: int) -> None:
        super().__init__()
        self._go, self._free = go, free

    def _draw(self, request):
        if int(request.prompt.split()[-1]) >= self._free:
            wait_until(self._go.exists, 240)
        shape = request.height, request.width, 3
        noise = np.random.default_rng(request.seed).integers(0, 256, shape, dtype=np.uint8)
        return replace(super()._draw(request), image=noise)


class KillsTheActor(FakeEngine):
    """Ends the actor at the prompt "die", also from the actor's child process."""

    def _draw(self, request):
        parent = os.getppid()
        if request.prompt == "die" and b"ray::" in Path(f"/proc/{parent}/cmdline").read_bytes():
            os.kill(parent, signal.SIGKILL)
        return super()._draw(request)


class Working(FakeEngine):
    """Says how much work it had."""

    def _draw(self, request):
        usage = self.usage
        usage.seconds += 0.5
        usage.idle_seconds += 0.125
        usage.rows += 4
        usage.filled += 3
        return super()._draw(request)


def cannot_load():
    raise ModelError("model.path = 'x': cannot be loaded")


def loads_once(marker: Path):
    """The first actor draws and dies of a shard; none that comes after it can load."""
    if marker.exists():
        raise ModelError("model.path = 'x': gone")
    marker.touch()
    return FakeEngine(delay=0.05)


def dies_while_loading():
    os._exit(1)


def in_the_way(path: Path):
    """Put a file where the run will want a folder."""
    path.write_text("a file where a folder goes")
    return FakeEngine()

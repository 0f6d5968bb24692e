"""Fake engines of the tests of isolation; here, so that a child process imports no more."""

import os
from pathlib import Path

from sdbatch.errors import ModelError
from tests.fakes import FakeEngine
from tests.wait import wait_until


class Known(FakeEngine):
    """Writes its process id to a file of a folder, one for each engine that is made."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder
        (folder / str(os.getpid())).touch()


class Stuck(Known):
    """Never ends to draw the prompt "stuck"; notes in its folder that it has begun."""

    def _draw(self, request):
        if request.prompt == "stuck":
            (self._folder / "began").touch()
            wait_until(lambda: False, 3600)
        return super()._draw(request)


class StuckOnce(Stuck):
    """Is stuck in the first process that draws the prompt "stuck", and draws it in all others."""

    def _draw(self, request):
        if (self._folder / "began").exists():
            return FakeEngine._draw(self, request)
        return super()._draw(request)


class Loud(FakeEngine):
    """Prints while it draws, as libraries do."""

    def _draw(self, request):
        os.write(1, b"a library prints\n")
        return super()._draw(request)


class Refusing(FakeEngine):
    """Cannot go on after the prompt "refuse"."""

    def _draw(self, request):
        if request.prompt == "refuse":
            raise ModelError("engine = out of memory: must fit into it.")
        return super()._draw(request)


def cannot_load():
    raise ModelError("model.path = 'x': cannot be loaded")


def dies_while_loading(folder: Path, times: int):
    """Die in as many processes as `times`, then make an engine."""
    if len(list(folder.iterdir())) < times:
        (folder / str(os.getpid())).touch()
        os._exit(3)
    return FakeEngine()

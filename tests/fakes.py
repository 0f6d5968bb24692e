"""The fake engine: draws at once, or fails, or dies, as the prompt says; or what it is given."""

import os
import signal
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np

from sdbatch.engine.request import Drawn, Follow, Request, Usage


class FakeEngine:
    """Draws a flat colour from the seed.

    A prompt may ask for a fault: fail, die (with exit code 7), die by SIGSEGV.
    """

    def __init__(self, delay: float = 0.0) -> None:
        self.usage = Usage()
        self._delay = delay  # seconds an image
        self._thread = ThreadPoolExecutor(1)

    stalled_seconds = 0.0
    device: Mapping[str, Any] = MappingProxyType({})

    def submit(
        self, request: Request, *, exact: bool = True, follow: Follow | None = None
    ) -> Future[Drawn]:
        return self._thread.submit(self._followed, request, exact, follow)

    def _followed(self, request: Request, exact: bool, follow: Follow | None) -> Drawn:
        drawn = replace(self._draw(request), exact=exact)
        ticks = request.num_inference_steps
        for tick in range(1, ticks + 1) if follow else ():
            follow.step(tick, ticks)
            if follow.is_due(tick, ticks):
                follow.preview(drawn)
        return drawn

    def _draw(self, request: Request) -> Drawn:
        if request.prompt == "die":
            os._exit(7)
        if request.prompt.startswith("die by "):
            os.kill(os.getpid(), signal.Signals[request.prompt.removeprefix("die by ")])
            threading.Event().wait()  # the signal may reach the process later
        time.sleep(self._delay)
        self.usage.ticks += 1
        if request.prompt == "fail":
            raise ValueError("this prompt cannot be drawn")
        colour = np.random.default_rng(request.seed).integers(0, 256, 3, dtype=np.uint8)
        image = np.broadcast_to(colour, (request.height, request.width, 3)).copy()
        tokens = len(request.prompt.split())
        return Drawn(image=image, prompt_tokens=tokens, prompt_truncated=False, lanes=2)


class Painter(FakeEngine):
    """Draws for a prompt the picture that it was given, (H, W, 3) uint8; else as FakeEngine."""

    def __init__(self, pictures: dict[str, np.ndarray]) -> None:
        super().__init__()
        self._pictures = pictures

    def _draw(self, request: Request) -> Drawn:
        drawn = super()._draw(request)
        picture = self._pictures.get(request.prompt)
        return drawn if picture is None else replace(drawn, image=picture)


class Inverter(FakeEngine):
    """Draws a request's picture with inverted colours; without one as FakeEngine."""

    def _draw(self, request: Request) -> Drawn:
        drawn = super()._draw(request)
        picture = request.inputs.get("image")
        return drawn if picture is None else replace(drawn, image=255 - picture)

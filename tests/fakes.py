"""The fake engine: draws at once, or fails, or dies, as the prompt says."""

import os
import time
from concurrent.futures import Future

import numpy as np

from sdbatch.engine.request import Drawn, Request


class FakeEngine:
    """Draws a flat colour from the seed. A prompt may ask for a fault: fail, die, sleep."""

    def __init__(self, delay: float = 0.0) -> None:
        self.ticks = 0
        self._delay = delay

    def submit(self, request: Request) -> Future[Drawn]:
        if request.prompt == "die":
            os._exit(1)
        time.sleep(self._delay)
        self.ticks += 1
        future: Future[Drawn] = Future()
        if request.prompt == "fail":
            future.set_exception(ValueError("this prompt cannot be drawn"))
            return future
        colour = np.random.default_rng(request.seed).integers(0, 256, 3, dtype=np.uint8)
        image = np.broadcast_to(colour, (request.height, request.width, 3)).copy()
        drawn = Drawn(image=image, prompt_tokens=len(request.prompt.split()), prompt_truncated=False)
        future.set_result(drawn)
        return future

"""A family with faults: it draws as the one inside it, until a test makes one of its calls fail."""

import threading
from typing import Any

import torch

from sdbatch.engine.request import Request


def nothing(*_: Any) -> None:
    """Let a call pass."""


class FaultyFamily:
    """Calls a hook at each of its calls. A hook may raise, wait, count, or break the latents.

    Attributes:
        on_scheduler: before a cohort starts, with its requests.
        on_denoise: before a denoiser call, with its latents, timesteps and conditions.
        on_step: after a cohort's step, with its requests and their new latents.
        on_decode: before a decoder call, with its latents and their type.
        on_pictures: after a decoder call, with its latents, their type, and which pictures are
            finite.
        whole: for each denoiser call, whether it reused nothing.
        first_lanes: of the last denoiser call.
    """

    def __init__(self, family) -> None:
        self.limits, self.keys = family.limits, family.keys
        self.on_scheduler = self.on_denoise = self.on_step = nothing
        self.on_decode = self.on_pictures = nothing
        self.whole: list[bool] = []
        self.first_lanes: list[int] = []
        self._family = family

    def __getattr__(self, name: str) -> Any:
        return getattr(self._family, name)

    def scheduler(self, requests, noise, generators):
        self.on_scheduler(requests)
        return FaultyScheduler(self, requests, self._family.scheduler(requests, noise, generators))

    def denoise(self, latents, timesteps, conditions, cache=None, first_lanes=None):
        self.first_lanes = first_lanes
        self.on_denoise(latents, timesteps, conditions)
        self.whole.append(not cache)
        return self._family.denoise(latents, timesteps, conditions, cache, first_lanes)

    def decode(self, latents, dtype):
        self.on_decode(latents, dtype)
        pictures = self._family.decode(latents, dtype)
        self.on_pictures(latents, dtype, pictures.finite)
        return pictures


class FaultyScheduler:
    """A scheduler of a faulty family."""

    def __init__(self, family: FaultyFamily, requests: list[Request], scheduler) -> None:
        self._family, self._requests, self._scheduler = family, requests, scheduler

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scheduler, name)

    def step(self, answer, step, latents):
        latents = self._scheduler.step(answer, step, latents)
        self._family.on_step(self._requests, latents)
        return latents


class Hold:
    """A hook that holds back every call, so that requests queue up behind the first."""

    def __init__(self) -> None:
        self._reached, self._released = threading.Event(), threading.Event()

    def __call__(self, *_: Any) -> None:
        self._reached.set()
        self._released.wait()

    def wait(self) -> None:
        """Wait until a call is held back."""
        self._reached.wait()

    def release(self) -> None:
        """Let this call and all others pass."""
        self._released.set()


class OutOfMemory:
    """A hook that raises above a number of rows, as a full device does."""

    def __init__(self, most: int = 0) -> None:
        self.most, self.raised = most, 0

    def __call__(self, latents, *_: Any) -> None:
        if len(latents) > self.most:
            self.raised += 1
            raise torch.OutOfMemoryError("tried to allocate 20 GiB")

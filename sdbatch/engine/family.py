"""The interface of a model family: all that the engine knows of a model.

Lanes join and pad named tensors without knowing them; a cohort steps through `Scheduler` without
knowing the convention of the sampler behind it. Every call has a fixed shape, padded and never
shrunk, so a row's bits depend neither on its neighbours nor on its place.

n = images, C = latent channels, h/w = latent height/width, H/W = image height/width in pixels.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from sdbatch.engine.limits import ModelLimits
from sdbatch.engine.request import Request

Conditions: TypeAlias = dict[str, torch.Tensor]  # by name; the first dimension is the lanes
Cache: TypeAlias = dict[str, torch.Tensor]  # the same, of what later calls reuse


@dataclass(frozen=True, slots=True)
class Pictures:
    """A decoded group, on the device."""

    pixels: torch.Tensor  # (n, H, W, 3) uint8
    finite: torch.Tensor  # (n,) bool: False where a value of the picture was inf or NaN


@dataclass(frozen=True, slots=True, eq=False)
class Original:
    """The noise-free latents of a row's picture, or of the first pass of hires fix."""

    latents: torch.Tensor  # (C, h, w), on the device
    mask: torch.Tensor | None = None  # (1, h, w): 1 where latents are drawn anew, else 0
    starts: bool = True  # the first latents are these with noise; False: noise alone


class Reading(Protocol):
    """The text and the inputs of a request, as its family reads them."""

    @property
    def lanes(self) -> int:
        """Return the lanes of the image while it is guided: 2 or 3."""

    @property
    def pictures(self) -> Mapping[str, NDArray[Any]]:
        """Return the pictures to encode before it is drawn, by name: (H, W, 3), 0 to 255."""

    @property
    def original(self) -> Original | None:
        """Return what its latents begin with and keep; None: they begin with noise."""

    @property
    def tokens(self) -> int:
        """Return the prompt's tokens, before truncation."""

    @property
    def truncated(self) -> bool:
        """Tell whether a prompt lost tokens."""

    def at(self, tick: int) -> "Reading":
        """Return what is drawn at a tick of its pass; an equal reading if nothing changes."""


class Scheduler(Protocol):
    """The steps of requests that are drawn together, from noise to latents. Keeps state."""

    @property
    def timesteps(self) -> torch.Tensor:
        """Return the timestep of each tick as `Family.denoise` takes it: (ticks,) on the device."""

    def start(self, noise: torch.Tensor) -> torch.Tensor:
        """Return the first latents of unit noise (n, C, h, w), on the device."""

    def noised(self, latents: torch.Tensor, noise: torch.Tensor, step: int) -> torch.Tensor:
        """Return noise-free latents (n, C, h, w) as they are before a step; at the end, as given.

        The unit noise (n, C, h, w) is on the device.
        """

    def model_input(self, latents: torch.Tensor, step: int) -> torch.Tensor:
        """Return what the denoiser takes at a step: (n, C, h, w)."""

    def step(self, answer: torch.Tensor, step: int, latents: torch.Tensor) -> torch.Tensor:
        """Return the latents after a step with the denoiser's answer, (n, C, h, w) both."""

    def clean(self, model_input: torch.Tensor, answer: torch.Tensor, step: int) -> torch.Tensor:
        """Return the noise-free latents that an answer implies: (..., C, h, w)."""

    def answer(self, model_input: torch.Tensor, clean: torch.Tensor, step: int) -> torch.Tensor:
        """Return the answer that implies noise-free latents: (..., C, h, w)."""


class Family(Protocol):
    """A loaded model. Only `read` may be called from any thread.

    What `read` returns, `shape` and `embed` get back.
    """

    @property
    def limits(self) -> ModelLimits:
        """Return what it can draw."""

    @property
    def device(self) -> torch.device:
        """Return the device of its weights, on which it draws."""

    @property
    def dtype(self) -> torch.dtype:
        """Return the type of its weights, in which it draws and decodes."""

    @property
    def compiled(self) -> bool:
        """Tell whether each new shape of a batch is compiled, which takes minutes."""

    @property
    def keys(self) -> frozenset[str]:
        """Return the sampling keys that it honours besides the engine's (engine.ENGINE_KEYS)."""

    def read(self, request: Request) -> Reading:
        """Read the text and the inputs of a request; a ValueError if they cannot be drawn."""

    def shape(self, request: Request, reading: Any) -> Hashable:
        """Return what requests must have in common to be rows of one denoiser call.

        If the family honours `cache_interval`, that is a part of it.
        """

    def noise(self, request: Request, generator: torch.Generator) -> torch.Tensor:
        """Draw the starting noise from the image's own generator: (C, h, w), unit variance, CPU."""

    def sigmas(self, request: Request) -> NDArray[np.float64]:
        """Return the noise level that each denoiser call sees, (ticks,).

        It is the standard deviation of the noise by that of the signal. Of a request that begins
        with a picture, the calls from there on. Raises a ValueError if the sampler cannot draw it.
        """

    def scheduler(
        self, requests: Sequence[Request], noise: torch.Tensor, generators: list[torch.Generator]
    ) -> Scheduler:
        """Return a fresh scheduler for requests of one kind; `noise` (n, C, h, w) is on the CPU."""

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return pictures (n, H, W, 3), 0 to 255, as latents: (n, K, h, w) with K as it needs.

        A row does not depend on the others; calls for one size have one number of rows.
        """

    def with_pictures(
        self, request: Request, reading: Any, encoded: Mapping[str, torch.Tensor]
    ) -> Reading:
        """Return a reading with its `pictures` as `encode` returns them: (K, h, w) each."""

    def embed(self, readings: Sequence[Any], soon: Iterable[Any]) -> tuple[Conditions, ...]:
        """Return the conditions of an image's lanes, n of each: prompts, negative prompts.

        Where a reading has 3 lanes, a third: of neither the prompt nor the picture. Readings that
        are needed `soon` are embedded too where that costs nothing.
        """

    def denoise(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        conditions: Conditions,
        cache: Cache | None = None,
        first_lanes: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Return the model's answer to a whole batch of lanes, (lanes, C, h, w).

        Args:
            latents: (lanes, C, h, w) in float32.
            timesteps: (lanes,).
            conditions: of the lanes.
            cache: of requests with a `cache_interval` above 1. If it is empty, the call computes
                everything and adds what later calls reuse. Otherwise it reuses that, lane by lane.
            first_lanes: of each lane before the padding, the first lane of its image; None: not
                known. Lanes of an image have equal latents and timesteps, and may differ in
                conditions.
        """

    def decode(self, latents: torch.Tensor, dtype: torch.dtype) -> Pictures:
        """Return the pictures of a group of latents, (n, C, h, w), decoded in a type.

        It is the family's own type, or float32 for latents whose pictures are not finite in that.
        """

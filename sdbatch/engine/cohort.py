"""A cohort: requests that step together, and the diffusers scheduler that steps them.

n = requests of the cohort, C = 4 latent channels, H/W = latent height/width (pixels / 8),
L = 77 text tokens, D = text width.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from sdbatch.engine.request import Request
from sdbatch.engine.text import Text

LATENT_CHANNELS = 4
VAE_FACTOR = 8


def initial_noise(generator: torch.Generator, height: int, width: int) -> torch.Tensor:
    """Draw an image's starting noise from that image's own generator; unit variance.

    On the CPU in float32, as CUDA's generator gives other numbers than the CPU's for a seed.

    Args:
        generator: of the CPU, seeded with the image's seed; the sampler goes on drawing from it.
        height: of the image in pixels, a multiple of 8.
        width: of the image in pixels, a multiple of 8.

    Returns:
        (C, height/8, width/8); multiply by the sampler's `init_noise_sigma`.

    Source: Rombach et al. 2022, sec. 3.1, with SD 1.x's choice of f = 8, 4 channels.
    """
    shape = (1, LATENT_CHANNELS, height // VAE_FACTOR, width // VAE_FACTOR)
    return torch.randn(shape, generator=generator)[0]


class Cohort:
    """Requests of one kind on their way from noise to latents, one timestep at a time.

    Its lanes are the rows it needs in a UNet call: for each request one with the prompt, and for
    a guided one another with the negative prompt.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        prompts: Sequence[Text],
        negatives: Sequence[Text],
        scheduler: Any,
        device: torch.device,
    ) -> None:
        self._scheduler = scheduler
        self._step = 0
        self._guided = [i for i, request in enumerate(requests) if request.guided]
        generators = [torch.Generator().manual_seed(request.seed) for request in requests]
        draws = "generator" in inspect.signature(scheduler.step).parameters
        self._noise = {"generator": generators} if draws else {}
        noise = [
            initial_noise(generator, request.height, request.width)
            for generator, request in zip(generators, requests, strict=True)
        ]
        self.latents = torch.stack(noise).to(device) * scheduler.init_noise_sigma  # (n, C, H, W)
        scales = torch.tensor([requests[i].guidance_scale for i in self._guided])
        self._scales = scales.to(device).view(-1, 1, 1, 1)
        texts = [*(t.embedding for t in prompts), *(negatives[i].embedding for i in self._guided)]
        self.context = torch.stack(texts)  # (lanes, L, D)

    @property
    def lanes(self) -> int:
        """Return how many rows of the UNet batch the cohort takes."""
        return len(self.context)

    @property
    def done(self) -> bool:
        """Tell whether the latents are finished."""
        return self._step == len(self._scheduler.timesteps)

    @property
    def timestep(self) -> torch.Tensor:
        """Return the scheduler's current timestep, a scalar."""
        return self._scheduler.timesteps[self._step]  # type: ignore[no-any-return]

    def model_input(self) -> torch.Tensor:
        """Return what the cohort's lanes put into the UNet: (lanes, C, H, W) in float32."""
        scaled = self._scheduler.scale_model_input(self.latents, self.timestep)
        return torch.cat([scaled, scaled[self._guided]])

    def advance(self, noise: torch.Tensor) -> None:
        """Step all requests with the UNet's answer, (lanes, C, H, W).

        Guidance as in Ho and Salimans 2022, in the form of Saharia et al. 2022 (Imagen), eq. 2.
        """
        noise = noise.float()
        prompted, negative = noise[: len(self.latents)].clone(), noise[len(self.latents) :]
        prompted[self._guided] = negative + self._scales * (prompted[self._guided] - negative)
        self.latents = self._scheduler.step(
            prompted, self.timestep, self.latents, return_dict=False, **self._noise
        )[0]
        self._step += 1

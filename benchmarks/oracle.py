"""One of our requests, drawn by diffusers' own pipelines."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.schedulers import AysSchedules
from numpy.typing import NDArray

from sdbatch import samplers
from sdbatch.engine.engine import Engine
from sdbatch.engine.family import Pictures
from sdbatch.engine.request import Request
from sdbatch.models.sd1.family import StableDiffusion1
from sdbatch.models.sd1.loading import Model


def pipeline(model: Model, kind: Any = StableDiffusionPipeline) -> Any:
    """Return diffusers' pipeline of a kind over the parts of `model`."""
    pipe = kind(
        vae=model.vae,
        text_encoder=model.text_encoder,
        tokenizer=model.tokenizer,
        unet=model.unet,
        scheduler=DDIMScheduler.from_config(model.scheduler_config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


class LMS(diffusers.LMSDiscreteScheduler):
    """diffusers' LMS with the weights of as many answers as it has had.

    The same from the beginning; from a picture on, diffusers takes the weights of four at once.
    """

    def step(self, model_output: Any, timestep: Any, sample: Any, **arguments: Any) -> Any:
        """Step with an order that is at most the number of answers."""
        order = min(len(self.derivatives) + 1, 4)
        return super().step(model_output, timestep, sample, order=order, **arguments)


CORRECTED = {"LMSDiscreteScheduler": LMS}


@contextmanager
def posterior_means() -> Iterator[None]:
    """Have diffusers encode pictures as the mean of their posterior, as rows do.

    It samples the posterior with the generator from which it draws the noise next.
    """

    def mean(self: Any, generator: torch.Generator | None = None) -> torch.Tensor:
        latents: torch.Tensor = self.mode()
        return latents

    with mock.patch.object(DiagonalGaussianDistribution, "sample", mean):
        yield


def draw(pipe: Any, request: Request, scheduler_config: dict[str, Any], **given: Any) -> Any:
    """Draw the request alone; returns (H, W, 3) in [0, 1], or latents with output_type="latent".

    `given` goes to the pipeline and replaces values of the request.
    """
    sampler, schedule = samplers.split(request.sampler)
    arguments = dict(sampler.arguments)
    if schedule in samplers.CONVERTED:
        arguments[f"use_{schedule}_sigmas"] = True
    if schedule == samplers.TRAILING:
        arguments["timestep_spacing"] = "trailing"
    if sampler.scheduler == "DPMSolverSDEScheduler":
        arguments["noise_sampler_seed"] = [request.seed]
    kind = CORRECTED.get(sampler.scheduler) or getattr(diffusers, sampler.scheduler)
    pipe.scheduler = kind.from_config(scheduler_config, **arguments)
    if schedule == samplers.AYS:  # the published schedule has ten steps
        # not the pipelines' `timesteps`: from a picture they take a step for each call of heun's,
        # and the one for edits has none
        ays = AysSchedules["StableDiffusionTimesteps"]
        set_timesteps = partial(pipe.scheduler.set_timesteps, timesteps=ays)
        pipe.scheduler.set_timesteps = lambda _, device: set_timesteps(device=device)
    if "prompt_embeds" not in given:
        given |= {"prompt": request.prompt, "negative_prompt": request.negative_prompt}
    return pipe(
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        guidance_rescale=request.guidance_rescale,
        eta=request.eta,
        height=request.height,
        width=request.width,
        generator=torch.Generator().manual_seed(request.seed),
        **{"output_type": "np", **given},
    ).images[0]


class KeepsLatents(StableDiffusion1):
    """Keeps the last latents that it decodes: (C, h, w)."""

    last = torch.empty(0)

    def decode(self, latents: torch.Tensor, dtype: torch.dtype) -> Pictures:
        """Keep the first latents of the group, and decode it."""
        self.last = latents[0].clone()
        return super().decode(latents, dtype)


class Pair:
    """An engine and diffusers' pipelines over one model."""

    def __init__(self, model: Model, lanes: int) -> None:
        self._model = model
        self._family = KeepsLatents(model)
        self.engine = Engine(self._family, lanes=lanes, threads=1)

    def differences(self, kind: Any, request: Request, **given: Any) -> tuple[float, int]:
        """Draw a request with both; return the largest difference of latents, and of counts.

        Args:
            kind: of pipeline.
            request: alone.
            **given: as for draw.

        Returns:
            That of latents by the largest latent; that of pixels in counts of 255.
        """
        latents = torch.empty(0)

        def keep(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            nonlocal latents
            latents = values["latents"][0].float()
            return values

        image = self.engine.submit(request).result().image.astype(int)
        pipe, config = pipeline(self._model, kind), self._model.scheduler_config
        reference = draw(pipe, request, config, callback_on_step_end=keep, **given)
        off = (self._family.last - latents).abs().max() / latents.abs().max()
        return float(off), int(np.abs(image - counts(reference)).max())


def counts(image: NDArray[np.float32]) -> NDArray[np.int64]:
    """Return an image in [0, 1] in counts of 255, as diffusers rounds it."""
    return (image * 255).round().astype(int)

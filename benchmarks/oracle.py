"""One of our requests, drawn by diffusers' own pipelines."""

from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.schedulers import AysSchedules
from numpy.typing import NDArray

from sdbatch import samplers
from sdbatch.engine.request import Request
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
    pipe.scheduler = getattr(diffusers, sampler.scheduler).from_config(
        scheduler_config, **arguments
    )
    if schedule == samplers.AYS:  # the published schedule has ten steps
        given["timesteps"] = AysSchedules["StableDiffusionTimesteps"]
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


def counts(image: NDArray[np.float32]) -> NDArray[np.int64]:
    """Return an image in [0, 1] in counts of 255, as diffusers rounds it."""
    return (image * 255).round().astype(int)

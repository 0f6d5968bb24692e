"""Every sampler against diffusers' own pipeline on the same weights and seeds."""

from typing import get_args

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from sdbatch.engine.samplers import SAMPLERS, make_scheduler
from sdbatch.job import Sampler

# One count in 255: the UNet's batch shape differs, which moves float32 by about 1e-6, and rounding
# to uint8 can then fall to the other side.
MOST_COUNTS = 1


@pytest.fixture(scope="module")
def pipeline(tiny_model):
    pipe = StableDiffusionPipeline.from_pretrained(
        tiny_model, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def reference(pipe, model, request) -> np.ndarray:
    """Draw the request with diffusers' pipeline alone."""
    name, arguments = SAMPLERS[request.sampler]
    pipe.scheduler = getattr(diffusers, name).from_config(model.scheduler_config, **arguments)
    image = pipe(
        request.prompt,
        negative_prompt=request.negative_prompt,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        height=request.height,
        width=request.width,
        generator=torch.Generator().manual_seed(request.seed),
        output_type="np",
    ).images[0]
    return (image * 255).round().astype(int)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
def test_engine_draws_what_diffusers_draws(
    engine, pipeline, model, request_for, sampler, guidance_scale
):
    request = request_for(
        sampler=sampler,
        guidance_scale=guidance_scale,
        negative_prompt="blurry",
        num_inference_steps=12,
    )
    drawn = engine.submit(request).result().image.astype(int)
    assert np.abs(drawn - reference(pipeline, model, request)).max() <= MOST_COUNTS
    assert drawn.std() > 1  # a picture of something, not of nothing


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_seeds_draw_different_images(engine, request_for, sampler):
    one, two = (engine.submit(request_for(sampler=sampler, seed=seed)) for seed in (1, 2))
    assert (one.result().image != two.result().image).any()


@pytest.mark.parametrize("size", [(64, 96), (72, 64)])
def test_sizes_that_are_no_square_match_diffusers(engine, pipeline, model, request_for, size):
    request = request_for(height=size[0], width=size[1])
    drawn = engine.submit(request).result().image
    assert drawn.shape == (*size, 3)
    assert np.abs(drawn.astype(int) - reference(pipeline, model, request)).max() <= MOST_COUNTS


def test_samplers_are_those_of_the_job_file():
    assert tuple(SAMPLERS) == get_args(Sampler)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("num_inference_steps", [1, 2, 50])
def test_any_number_of_steps_draws_or_fails_with_a_reason(model, sampler, num_inference_steps):
    try:
        scheduler = make_scheduler(sampler, model.scheduler_config, num_inference_steps)
    except ValueError as error:
        assert "steps" in str(error)  # noqa: PT017  diffusers' own words
    else:
        assert len(scheduler.timesteps) >= num_inference_steps

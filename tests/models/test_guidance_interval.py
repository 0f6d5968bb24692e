"""Guidance where the noise is in an interval, against a plain loop over diffusers' scheduler."""

import math

import numpy as np
import pytest
import torch

from benchmarks import oracle
from sdbatch.models.schedulers import Kind, SchedulerCache, make_scheduler
from sdbatch.samplers import NAMES, SAMPLERS
from tests.models.load import MOST_COUNTS, difference, draw

LOW, HIGH = 0.3, 4.0
INTERVAL = {"guidance_sigma_low": LOW, "guidance_sigma_high": HIGH, "guidance_scale": 7.5}


def sigma_of(scheduler, timestep: float) -> float:
    """Return the noise by the signal of x = sqrt(a) x0 + sqrt(1 - a) noise, by a's definition."""
    levels = [math.sqrt((1 - float(a)) / float(a)) for a in scheduler.alphas_cumprod]
    return float(np.interp(timestep, np.arange(len(levels)), levels))


@torch.inference_mode()
def plain_loop(pipeline, request, config, start=0.0, stop=1.0):
    """Draw a request; return its picture and in which denoiser calls it was guided."""
    scheduler = make_scheduler(request.sampler, config, request.num_inference_steps)
    text, blank = pipeline.encode_prompt(request.prompt, "cpu", 1, True, request.negative_prompt)
    generator = torch.Generator().manual_seed(request.seed)
    latents = torch.randn(1, 4, request.height // 8, request.width // 8, generator=generator)
    latents = latents * scheduler.init_noise_sigma
    ticks, guided = len(scheduler.timesteps), []
    for tick, timestep in enumerate(scheduler.timesteps):
        x = scheduler.scale_model_input(latents, timestep)
        answer = pipeline.unet(x, timestep, text).sample
        in_noise = LOW < sigma_of(scheduler, float(timestep)) <= HIGH
        guided.append(in_noise and start * ticks <= tick < int(stop * ticks))
        if guided[-1]:
            negative = pipeline.unet(x, timestep, blank).sample
            answer = negative + request.guidance_scale * (answer - negative)
        latents = scheduler.step(answer, timestep, latents, return_dict=False)[0]
    image = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample[0]
    return oracle.counts((image / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy()), guided


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm2", "dpmpp_2m_karras"])
def test_an_image_is_guided_where_its_noise_is_in_the_interval(
    model, pipeline, request_for, sampler
):
    request = request_for(sampler=sampler, num_inference_steps=12, **INTERVAL)
    image, guided = plain_loop(pipeline, request, model.scheduler_config)
    assert 0 < sum(guided) < len(guided)
    (drawn,) = draw(model, [request])
    assert difference(drawn.image, image) <= MOST_COUNTS
    (whole,) = draw(model, [request.model_copy(update={"guidance_sigma_low": 0.0})])
    assert (whole.image != drawn.image).any()


def test_both_intervals_must_hold_of_noise_and_of_steps(model, pipeline, request_for):
    request = request_for(num_inference_steps=12, guidance_start=0.1, guidance_stop=0.5, **INTERVAL)
    image, guided = plain_loop(pipeline, request, model.scheduler_config, start=0.1, stop=0.5)
    by_noise = plain_loop(pipeline, request, model.scheduler_config)[1]
    assert 0 < sum(guided) < sum(by_noise)
    (drawn,) = draw(model, [request])
    assert difference(drawn.image, image) <= MOST_COUNTS


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in SAMPLERS else pytest.mark.slow) for name in NAMES],
)
def test_every_sampler_knows_the_noise_of_its_denoiser_calls(model, name):
    scheduler = make_scheduler(name, model.scheduler_config, 8)
    sigmas = SchedulerCache(model.scheduler_config, model.device).sigmas(Kind(name, 8, 0))
    expected = [sigma_of(scheduler, t) for t in scheduler.timesteps.tolist()]
    np.testing.assert_allclose(sigmas, expected, rtol=1e-6)


def test_the_noise_of_a_karras_schedule_is_diffusers_own(model):
    scheduler = make_scheduler("euler_karras", model.scheduler_config, 10)
    sigmas = SchedulerCache(model.scheduler_config, model.device).sigmas(
        Kind("euler_karras", 10, 0)
    )
    np.testing.assert_allclose(sigmas, scheduler.sigmas[:-1], rtol=0.02)

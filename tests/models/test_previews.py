"""Previews of Stable Diffusion 1.x beside diffusers' own estimate of the finished image."""

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler

from sdbatch.engine.cohort import Cohort, Ticket
from sdbatch.engine.request import Follow
from sdbatch.models.sd1.family import StableDiffusion1


@pytest.mark.parametrize("sampler", ["ddim", "euler"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_preview_is_diffusers_own_estimate_of_the_image(model, request_for, sampler, prediction):
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    make = {"ddim": DDIMScheduler, "euler": EulerDiscreteScheduler}[sampler]
    scheduler = make(**betas, prediction_type=prediction, steps_offset=1)
    if sampler == "ddim":
        scheduler.register_to_config(clip_sample=False)
    scheduler.set_timesteps(8)
    sd = StableDiffusion1(model)
    request = request_for(guidance_scale=1.0, sampler=sampler)
    sd._schedulers.make = lambda *_: scheduler
    ticket = Ticket(request, sd.read(request), follow=Follow(print, print, previews=7))
    ticket.ticks = 8
    cohort = Cohort([ticket], sd)
    for step in range(7):
        cohort.model_input()
        answer = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(step))
        theirs = []
        plain = scheduler.step

        def step_and_look(*args, theirs=theirs, plain=plain, **options):
            out = plain(*args, **{**options, "return_dict": True})
            theirs.append(out.pred_original_sample)
            return (out.prev_sample,)

        scheduler.step = step_and_look
        cohort.advance(answer)
        scheduler.step = plain
        [(_, ours)] = cohort.previews
        torch.testing.assert_close(ours, theirs[0][0], rtol=2e-4, atol=2e-4)

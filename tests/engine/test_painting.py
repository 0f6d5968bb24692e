"""Outside of a mask a picture stays as it is, by diffusers' rule or by AUTOMATIC1111's."""

import pytest
import torch

from sdbatch.engine.cohort import Cohort, Ticket
from sdbatch.engine.family import Original
from sdbatch.engine.noise import start_noise
from sdbatch.engine.request import Follow

SAMPLERS = ("euler", "euler_a", "ddim", "heun", "pndm", "dpmpp_2s")


@pytest.fixture(params=SAMPLERS)
def sampler(request, kind):
    if request.param not in kind.samplers:
        pytest.skip(f"{kind.name} has no {request.param}")
    return request.param


@pytest.fixture
def painted(family, request_for, sampler):
    """Build a cohort of one request, drawn within the right half of a picture."""

    def build(**values):
        request = request_for(sampler=sampler, num_inference_steps=8, guidance_scale=1.0, **values)
        reading = family.read(request)
        chance = torch.Generator().manual_seed(1)
        latents = start_noise(family, request, torch.Generator().manual_seed(99))
        mask = torch.zeros(1, *latents.shape[1:])
        mask[..., mask.shape[-1] // 2 :] = 1
        ticket = Ticket(request, reading, original=Original(latents, mask))
        ticket.sigmas = family.sigmas(request)
        ticket.follow = Follow(print, print, previews=ticket.ticks - 1)
        return Cohort([ticket], family), latents, mask[0].bool(), chance

    return build


def answer_of(cohort, chance):
    return torch.randn(cohort.lanes, *cohort.latents.shape[1:], generator=chance)


def test_as_a1111_does_every_answer_implies_the_picture_outside_of_the_mask(painted):
    cohort, picture, drawn, chance = painted(compat="a1111")
    while cohort.step < cohort.tickets[0].ticks - 1:
        cohort.model_input()
        cohort.advance(answer_of(cohort, chance))
        [(_, clean)] = cohort.previews
        assert torch.allclose(clean[:, ~drawn], picture[:, ~drawn], atol=1e-3)
        assert not torch.allclose(clean[:, drawn], picture[:, drawn], atol=0.1)


def test_as_diffusers_does_every_step_ends_with_the_picture_outside_of_the_mask(painted, family):
    cohort, picture, drawn, chance = painted()
    request = cohort.tickets[0].request
    generator = torch.Generator().manual_seed(request.seed)
    noise = start_noise(family, request, generator)[None]
    scheduler = family.scheduler([request], noise, [generator])
    latents = cohort.latents
    while not cohort.done:
        answer = answer_of(cohort, chance)
        cohort.model_input()
        cohort.advance(answer)
        scheduler.model_input(latents, cohort.step - 1)
        stepped = scheduler.step(answer, cohort.step - 1, latents)
        proper = scheduler.noised(picture[None], noise, cohort.step)
        assert torch.equal(cohort.latents, torch.where(drawn, stepped, proper))
        latents = cohort.latents
    assert torch.equal(latents[0][:, ~drawn], picture[:, ~drawn])


def test_rows_without_a_mask_step_as_without_such_neighbours(painted, family):
    cohort, _, _, chance = painted()
    other, *_ = painted(compat="a1111")
    plain = Ticket(cohort.tickets[0].request, cohort.tickets[0].reading)
    plain.sigmas = cohort.tickets[0].sigmas
    together = Cohort([cohort.tickets[0], plain, other.tickets[0]], family)
    alone = Cohort([plain], family)
    while not alone.done:
        answer = answer_of(alone, chance)
        for each in (together, alone):
            each.model_input()
        together.advance(answer.repeat_interleave(3, 0))
        alone.advance(answer)
        assert torch.equal(together.latents[1], alone.latents[0])

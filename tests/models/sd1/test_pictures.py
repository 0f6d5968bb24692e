"""Image to image and inpainting with 4 channels draw what diffusers' pipelines draw.

diffusers encodes pictures as the mean of their posterior here, as rows do.
"""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image

from benchmarks import oracle
from sdbatch.engine.cohort import Cohort, Ticket
from sdbatch.engine.noise import stream
from sdbatch.models.schedulers import make_scheduler
from sdbatch.models.sd1.family import StableDiffusion1
from tests.models.load import MOST_COUNTS

HEIGHT, WIDTH = 64, 72
PICTURE = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
MASK = np.random.default_rng(1).integers(0, 256, (HEIGHT, WIDTH), np.uint8)  # of every grey


@pytest.fixture(scope="module")
def pair(model):
    pair = oracle.Pair(model, lanes=4)
    yield pair
    pair.engine.close()


@pytest.fixture
def pictured(request_for):
    """Build a request for image to image, or for inpainting."""

    def build(mask=False, **values):
        inputs = {"image": PICTURE} | ({"mask": MASK} if mask else {})
        return request_for(**{"height": HEIGHT, "width": WIDTH, "inputs": inputs, **values})

    return build


@pytest.mark.parametrize("sampler", ["euler_a", "heun", "lms", "dpmpp_sde"])
@pytest.mark.parametrize(("mask", "strength"), [(False, 0.6), (True, 0.6), (True, 1.0)])
def test_a_row_with_a_picture_is_that_of_diffusers(pair, pictured, sampler, mask, strength):
    request = pictured(mask, sampler=sampler, strength=strength)
    kind = StableDiffusionInpaintPipeline if mask else StableDiffusionImg2ImgPipeline
    given = {"image": Image.fromarray(PICTURE), "strength": strength}
    if mask:
        given["mask_image"] = Image.fromarray(MASK)
    with oracle.posterior_means():
        latents, counts = pair.differences(kind, request, **given)
    assert latents < 1e-5
    assert counts <= MOST_COUNTS


@torch.inference_mode()
def ticket_of(family, request):
    """Return a request whose pictures are encoded."""
    reading = family.read(request)
    pixels = [torch.tensor(each)[None] for each in reading.pictures.values()]
    encoded = {
        name: family.encode(each)[0] for name, each in zip(reading.pictures, pixels, strict=True)
    }
    if encoded:
        reading = family.with_pictures(request, reading, encoded)
    return Ticket(request, reading, sigmas=family.sigmas(request), original=reading.original)


def test_a_picture_row_starts_with_the_noise_of_text_to_image_with_its_seed(
    model, pictured, request_for
):
    family = StableDiffusion1(model)
    text = ticket_of(family, request_for(height=HEIGHT, width=WIDTH))
    noise = family.noise(text.request, torch.Generator().manual_seed(text.request.seed))
    painted = ticket_of(family, pictured(mask=True, strength=1.0))
    assert torch.equal(Cohort([painted], family).latents, Cohort([text], family).latents)
    begun = ticket_of(family, pictured(strength=0.5))
    scheduler = family.scheduler([begun.request], noise[None], [torch.Generator()])
    expected = scheduler.noised(begun.original.latents, noise, 0)
    assert torch.equal(Cohort([begun], family).latents[0], expected)


def test_a_sampled_posterior_changes_the_pictures_latents_alone(model, pictured):
    family = StableDiffusion1(model)
    mean, sample = (
        ticket_of(family, pictured(sampler="euler_a", strength=0.5, sample_posterior=sampled))
        for sampled in (False, True)
    )
    with torch.inference_mode():
        moments = family.encode(torch.tensor(PICTURE)[None])
    posterior = DiagonalGaussianDistribution(moments)
    own = stream(sample.request.seed, "posterior image")
    scaled = posterior.sample(own)[0] * model.vae.config.scaling_factor
    assert torch.allclose(sample.original.latents, scaled, atol=1e-6)
    assert not torch.allclose(sample.original.latents, mean.original.latents, atol=1e-3)
    # a denoiser that sees no noise leaves them apart as they are, if all noise is the same
    apart = sample.original.latents - mean.original.latents
    one, two = (Cohort([each], family) for each in (mean, sample))
    for _ in range(one.tickets[0].ticks):
        assert torch.allclose(two.latents[0] - one.latents[0], apart, atol=1e-4)
        for each in (one, two):
            each.model_input()
            each.advance(torch.zeros(each.lanes, *each.latents.shape[1:]))


@pytest.mark.parametrize("sampled", [False, True])
def test_the_samplers_noise_goes_on_from_the_seed_after_the_starts(model, pictured, sampled):
    family = StableDiffusion1(model)
    request = pictured(sampler="euler_a", strength=0.5, sample_posterior=sampled)
    cohort = Cohort([ticket_of(family, request)], family)
    steps, first = request.steps_from_picture()
    reference = make_scheduler("euler_a", model.scheduler_config, steps)
    reference.set_begin_index(first)
    generator = torch.Generator().manual_seed(request.seed)
    torch.randn(cohort.latents.shape, generator=generator)  # the start's
    latents = cohort.latents
    for timestep in reference.timesteps[first:]:
        answer = torch.ones(cohort.lanes, *latents.shape[1:])
        cohort.model_input()
        cohort.advance(answer)
        reference.scale_model_input(latents, timestep)
        latents = reference.step(answer[:1], timestep, latents, generator=generator).prev_sample
        assert torch.equal(cohort.latents, latents)
    assert cohort.done

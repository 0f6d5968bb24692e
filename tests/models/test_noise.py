"""The starting noise is an image's own."""

import pytest
import torch

from sdbatch.models.sd1.family import StableDiffusion1


@pytest.fixture
def noise(model, request_for):
    """Draw the noise of an image from a generator of this seed."""
    family = StableDiffusion1(model)

    def draw(seed, height=64, width=64):
        request = request_for(height=height, width=width)
        return family.noise(request, torch.Generator().manual_seed(seed))

    return draw


def test_noise_is_a_function_of_the_seed(noise):
    one, two, other = (noise(seed, 64, 96) for seed in (5, 5, 6))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (72, 512)])
def test_noise_has_the_shape_of_the_latents_and_unit_variance(noise, height, width):
    drawn = noise(0, height, width)
    assert drawn.shape == (4, height // 8, width // 8)
    assert abs(drawn.std().item() - 1) < 0.1


def test_a_generator_keeps_32_bits_of_a_seed(noise):
    """Why prompts/requests.py draws seeds below 2**32: if torch changes this, change that."""
    low, high = (noise(seed) for seed in (1, 1 + 2**32))
    assert torch.equal(low, high)

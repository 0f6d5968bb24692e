"""The starting noise is an image's own."""

import pytest
import torch

from sdbatch.models.sd1.family import initial_noise


def generator(seed):
    return torch.Generator().manual_seed(seed)


def test_noise_is_a_function_of_the_seed():
    one, two, other = (initial_noise(generator(seed), 64, 96) for seed in (5, 5, 6))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (72, 512)])
def test_noise_has_the_latents_shape_and_unit_variance(height, width):
    noise = initial_noise(generator(0), height, width)
    assert noise.shape == (4, height // 8, width // 8)
    assert abs(noise.std().item() - 1) < 0.1


def test_generator_keeps_32_bits_of_a_seed():
    """Why prompts/requests.py draws seeds below 2**32: if torch changes this, change that."""
    low, high = (initial_noise(generator(seed), 64, 64) for seed in (1, 1 + 2**32))
    assert torch.equal(low, high)

"""The starting noise of a row: its seed's, varied, or between two seeds."""

import math

import pytest
import torch

from sdbatch.engine.noise import slerp, slerp_columns, start_noise, stream
from sdbatch.engine.request import Request


def noise_of(family, seed, **keys):
    request = Request(prompt="a dog", sampler="euler", height=32, width=24, seed=seed, **keys)
    return start_noise(family, request, torch.Generator().manual_seed(seed))


def by_the_formula(share, one, two):
    """The reference: one column of one channel after the other, in float64."""
    mixed = torch.empty_like(one, dtype=torch.float64)
    for channel in range(one.shape[0]):
        for column in range(one.shape[2]):
            a, b = one[channel, :, column].double(), two[channel, :, column].double()
            angle = math.acos(float(a @ b / (a.norm() * b.norm())))
            low = math.sin((1 - share) * angle) / math.sin(angle)
            high = math.sin(share * angle) / math.sin(angle)
            mixed[channel, :, column] = low * a + high * b
    return mixed


def test_a_variation_is_on_the_arc_of_each_column_as_automatic1111_computes_it(family):
    one, two = noise_of(family, 1), noise_of(family, 2)
    varied = noise_of(family, 1, variation_seed=2, variation_strength=0.3)
    assert torch.allclose(varied.double(), by_the_formula(0.3, one, two), atol=1e-5)


def test_a_variation_ends_at_both_seeds(family):
    one, two = noise_of(family, 1), noise_of(family, 2)
    assert torch.equal(noise_of(family, 1, variation_seed=2), one)
    whole = noise_of(family, 1, variation_seed=2, variation_strength=1.0)
    assert torch.allclose(whole, two, atol=1e-5)


def test_a_variation_with_nearly_the_same_noise_is_a_line_with_the_weights_swapped():
    one = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0))
    two = one + 0.001
    mixed = slerp_columns(0.25, one, two)
    assert torch.equal(mixed, 0.25 * one + 0.75 * two)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_noise_between_two_seeds_keeps_its_size_and_its_angles(share):
    one, two = (torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    two = two * (one.norm() / two.norm())
    mixed = slerp(share, one, two).double()

    def angle(a, b):
        return torch.acos(((a * b).sum() / (a.norm() * b.norm())).clamp(-1, 1))

    one, two = one.double(), two.double()
    assert torch.isclose(mixed.norm(), one.norm(), rtol=1e-5)
    assert torch.isclose(angle(one, mixed), share * angle(one, two), atol=1e-3)


def test_mix_leads_from_the_rows_seed_to_seed_b(family):
    one, two = noise_of(family, 1), noise_of(family, 2)
    assert torch.equal(noise_of(family, 1, seed_b=2, mix=0.0), one)
    assert torch.allclose(noise_of(family, 1, seed_b=2, mix=1.0), two, atol=1e-5)
    halfway = noise_of(family, 1, seed_b=2, mix=0.5)
    assert torch.allclose(halfway, slerp(0.5, one, two))
    assert not torch.allclose(halfway, (one + two) / 2, atol=0.01)


def test_mix_without_seed_b_keeps_the_noise(family):
    assert torch.equal(noise_of(family, 1, mix=0.7), noise_of(family, 1))


def test_noise_between_equal_seeds_is_the_seeds_own():
    one = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(slerp(0.3, one, one.clone()), one)


def test_named_streams_of_a_row_differ_and_are_its_own():
    def draw(seed, name):
        return torch.randn(8, generator=stream(seed, name))

    assert torch.equal(draw(1, "posterior"), draw(1, "posterior"))
    assert not torch.equal(draw(1, "posterior"), draw(2, "posterior"))
    assert not torch.equal(draw(1, "posterior"), draw(1, "other"))
    assert not torch.equal(
        draw(1, "posterior"), torch.randn(8, generator=torch.Generator().manual_seed(1))
    )

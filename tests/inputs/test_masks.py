"""Soft edges, cut-out regions, filling and blending."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdbatch.inputs import masks
from tests.inputs.files import colours


def box_mask(width, height, left, top, right, bottom):
    mask = np.zeros((height, width), np.uint8)
    mask[top:bottom, left:right] = 255
    return mask


def gaussian(mask, sigma):
    """Return the blur in float64, straight from its definition."""
    radius = int(2.5 * sigma + 0.5)
    kernel = np.exp(-(np.arange(-radius, radius + 1) ** 2) / (2 * sigma**2))
    kernel /= kernel.sum()
    values = mask.astype(float)
    for axis in (0, 1):
        around = [(radius, radius) if each == axis else (0, 0) for each in (0, 1)]
        padded = np.pad(values, around, mode="reflect")
        values = np.apply_along_axis(np.convolve, axis, padded, kernel, "valid")
    return values


@pytest.mark.parametrize("sigma", [1, 2, 4, 9])
def test_the_blur_is_a_gaussian_to_one_count(sigma):
    rng = np.random.default_rng(sigma)
    for mask in (
        box_mask(90, 70, 30, 20, 50, 45),
        box_mask(90, 70, 0, 0, 20, 70),  # up to the edges, which mirror it
        rng.integers(0, 256, (70, 90), np.uint8),
        box_mask(300, 200, 150, 100, 151, 101),
    ):
        assert abs(masks.blur(mask, sigma).astype(float) - gaussian(mask, sigma)).max() <= 1


def test_the_blur_ends_where_automatic1111s_does():
    blurred = masks.blur(box_mask(64, 64, 32, 0, 64, 64), 4)  # 21 pixels: 10 on each side
    assert blurred[30, 22] > 0
    assert not blurred[:, :22].any()
    assert (blurred[:, 42:] == 255).all()


def test_a_blur_of_the_largest_sigma_is_even_and_keeps_white():
    assert (masks.blur(np.full((40, 8), 255, np.uint8), 256) == 255).all()
    mask = box_mask(512, 512, 128, 128, 384, 384)
    blurred = masks.blur(mask, 256)
    assert np.array_equal(blurred, blurred[::-1, ::-1])
    assert abs(blurred.astype(int) - blurred.T).max() <= 1
    assert masks.blur(mask, 0) is mask


@pytest.mark.parametrize(
    ("mask", "padding", "image", "region"),
    [
        # The values of AUTOMATIC1111's get_crop_region and expand_crop_region, worked out by hand.
        (box_mask(512, 512, 100, 100, 200, 150), 0, (512, 512), (100, 75, 200, 175)),
        (box_mask(512, 512, 100, 100, 200, 150), 32, (512, 512), (68, 43, 232, 207)),
        (box_mask(512, 512, 100, 100, 150, 200), 10, (512, 256), (5, 90, 245, 210)),
        (box_mask(512, 512, 0, 0, 100, 20), 0, (512, 512), (0, 0, 100, 100)),
        (box_mask(512, 512, 412, 492, 512, 512), 0, (512, 512), (412, 412, 512, 512)),
        (box_mask(512, 64, 0, 0, 300, 64), 0, (512, 512), (0, 0, 300, 64)),  # no room
        (box_mask(64, 64, 0, 0, 64, 64), 256, (512, 512), (0, 0, 64, 64)),
        (box_mask(100, 100, 10, 10, 13, 11), 0, (512, 512), (10, 9, 13, 12)),
    ],
)
def test_the_region_around_a_mask(mask, padding, image, region):
    assert masks.region_of(mask, padding, image) == region


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_region_holds_its_mask_and_lies_in_the_picture(data):
    width, height = (data.draw(st.integers(8, 90)) for _ in range(2))
    mask = np.zeros((height, width), np.uint8)
    for _ in range(2):
        mask[data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))] = 1
    image = data.draw(st.integers(1, 9)) * 8, data.draw(st.integers(1, 9)) * 8
    left, top, right, bottom = masks.region_of(mask, data.draw(st.integers(0, 40)), image)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    assert mask.sum() == mask[top:bottom, left:right].sum()


def test_filling_spreads_the_colours_around_the_mask():
    image = np.zeros((64, 64, 3), np.uint8)
    image[:, :32] = (200, 0, 0)
    image[:, 32:] = (0, 0, 200)
    mask = box_mask(64, 64, 8, 16, 56, 48)
    image[mask == 255] = (0, 255, 0)
    filled = masks.fill(image, mask)
    assert np.array_equal(filled[mask == 0], image[mask == 0])
    under = filled[16:48, 8:56].astype(int)
    assert under[..., 1].max() == 0  # no green left
    assert under[16, 2, 0] > 150 > under[16, 2, 2]  # red on the left
    assert under[16, -3, 2] > 150 > under[16, -3, 0]


def test_filling_a_plain_colour_gives_that_colour():
    image = np.full((40, 40, 3), (120, 60, 30), np.uint8)
    filled = masks.fill(image, box_mask(40, 40, 10, 10, 30, 30)).astype(int)
    assert abs(filled - image).max() <= 6  # rounded six times, with little opacity


def test_blending_mixes_and_is_exact_at_both_ends():
    under, over = colours(9, 100, 1), colours(9, 100, 2)
    mask = np.random.default_rng(3).integers(0, 256, (100, 9), np.uint8)
    mask[:10], mask[10:20] = 0, 255
    mixed = masks.blend(under, over, mask)
    share = mask[..., None] / 255
    assert abs(mixed - (under * (1 - share) + over * share)).max() <= 0.5 + 1e-9
    assert np.array_equal(mixed[:10], under[:10])
    assert np.array_equal(mixed[10:20], over[10:20])

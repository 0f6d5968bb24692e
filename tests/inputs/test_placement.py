"""Which part of a picture becomes which part of an image."""

import numpy as np
import pytest
from PIL import Image

from sdbatch.inputs.placement import place, same_shape
from tests.inputs.files import colours

LANCZOS = Image.Resampling.LANCZOS


@pytest.mark.parametrize(
    ("fit", "picture", "image", "source", "target"),
    [
        ("crop", (400, 300), (200, 200), (50, 0, 350, 300), (0, 0, 200, 200)),
        ("crop", (300, 400), (200, 200), (0, 50, 300, 350), (0, 0, 200, 200)),
        ("crop", (401, 300), (300, 300), (50, 0, 350, 300), (0, 0, 300, 300)),
        ("crop", (100, 100), (300, 150), (0, 25, 100, 75), (0, 0, 300, 150)),
        ("pad", (400, 300), (200, 200), (0, 0, 400, 300), (0, 25, 200, 175)),
        ("pad", (300, 400), (200, 200), (0, 0, 300, 400), (25, 0, 175, 200)),
        ("pad", (4000, 8), (64, 64), (0, 0, 4000, 8), (0, 31, 64, 32)),
        ("stretch", (400, 300), (200, 64), (0, 0, 400, 300), (0, 0, 200, 64)),
    ],
)
def test_where_a_picture_goes(fit, picture, image, source, target):
    placement = place(fit, picture, image)
    assert placement.source == source
    assert placement.target == target


@pytest.mark.parametrize("resample", list(Image.Resampling))
@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_a_picture_of_the_images_size_keeps_its_pixels(fit, resample):
    pixels = colours(40, 24)
    placement = place(fit, (40, 24), (40, 24))
    assert np.array_equal(placement.apply(Image.fromarray(pixels), resample, 0), pixels)


@pytest.mark.parametrize("width", [40, 41, 47])
def test_cropping_alone_copies_pixels(width):
    pixels = colours(width, 24)
    cropped = place("crop", (width, 24), (40, 24)).apply(Image.fromarray(pixels), LANCZOS, 0)
    left = (width - 40) // 2
    assert np.array_equal(cropped, pixels[:, left : left + 40])


def test_padding_alone_copies_pixels_between_borders():
    pixels = colours(40, 17)
    placement = place("pad", (40, 17), (40, 24))
    padded = placement.apply(Image.fromarray(pixels), LANCZOS, 0)
    assert np.array_equal(padded[3:20], pixels)
    assert not padded[:3].any()
    assert not padded[20:].any()
    edges = placement.apply(Image.fromarray(pixels), LANCZOS, None)
    assert (edges[:3] == pixels[0]).all()
    assert (edges[20:] == pixels[-1]).all()


def test_reducing_by_box_averages_what_a_pixel_covers():
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:, :1] = 200
    reduced = place("stretch", (8, 8), (4, 2)).apply(
        Image.fromarray(pixels), Image.Resampling.BOX, 0
    )
    assert reduced[..., 0].tolist() == [[100, 0, 0, 0]] * 2


def test_a_smaller_version_of_the_picture_is_placed_alike():
    """So a mask of another size than its picture covers the same things."""
    mask = np.zeros((30, 40), np.uint8)
    mask[10:20, 10:25] = 255
    large = Image.fromarray(mask).resize((400, 300), Image.Resampling.NEAREST)
    placement = place("crop", (400, 300), (90, 90))
    nearest = Image.Resampling.NEAREST
    from_large, from_small = (
        placement.apply(each, nearest, 0) for each in (large, Image.fromarray(mask))
    )
    assert np.array_equal(from_large, from_small)
    assert from_large[30:60, 15:60].min() == 255


def test_shapes_are_the_same_up_to_a_pixels_rounding():
    assert same_shape((600, 400), (600, 400))
    assert same_shape((600, 400), (64, 43))
    assert same_shape((600, 400), (64, 42))
    assert same_shape((601, 400), (1200, 800))
    assert not same_shape((600, 400), (400, 600))
    assert not same_shape((512, 512), (600, 590))

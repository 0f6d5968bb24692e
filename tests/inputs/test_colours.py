"""All modes of pictures have the right 8-bit colours."""

import numpy as np
import pytest
from PIL import Image

from sdbatch.inputs.picture import read_mask, read_picture
from tests.inputs.files import chunk, colours, save

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def plain(colour, mode="RGB"):
    return Image.new(mode, (8, 8), colour)


def palette(*entries, **info):
    picture = Image.new("P", (8, 8), 1)
    picture.putpalette([value for entry in entries for value in entry])
    picture.info.update(info)
    return picture


def lab(light, a, b):
    return Image.merge(
        "LAB", [Image.new("L", (8, 8), value) for value in (light, a + 128, b + 128)]
    )


@pytest.mark.parametrize(
    ("file", "colour", "within"),
    [
        (save(plain(1, "1")), (255, 255, 255), 0),
        (save(plain(77, "L")), (77, 77, 77), 0),
        (save(plain((77, 255), "LA")), (77, 77, 77), 0),
        (save(plain((77, 0), "LA")), (255, 255, 255), 0),
        (save(plain((*BLUE, 255), "RGBA")), BLUE, 0),
        (save(plain((*BLUE, 51), "RGBA")), (204, 204, 255), 0),
        (save(plain((*BLUE, 51), "RGBA"), "WEBP", lossless=True), (204, 204, 255), 0),
        (save(palette(RED, GREEN)), GREEN, 0),
        (save(palette(RED, GREEN), transparency=1), (255, 255, 255), 0),
        (save(palette(RED, GREEN), transparency=b"\xff\x33"), (204, 255, 204), 0),
        (save(palette(RED, GREEN), "GIF"), GREEN, 0),
        (save(plain(RED), transparency=RED), (255, 255, 255), 0),
        (save(plain((0, 255, 255, 0), "CMYK"), "TIFF"), RED, 0),
        (save(plain((0, 255, 255, 0), "CMYK"), "JPEG", quality=100), RED, 3),  # Adobe's: inverted
        (save(plain((76, 85, 255), "YCbCr"), "TIFF"), RED, 2),
        (save(plain((76, 85, 255), "YCbCr"), "JPEG", quality=100), RED, 3),
        (save(lab(255, 0, 0), "TIFF"), (255, 255, 255), 1),
        (save(lab(138, 81, 70), "TIFF"), RED, 6),  # L 54.1, a 81, b 70 by D50: pure red
        (save(np.full((8, 8), 65535, np.uint16)), (255, 255, 255), 0),
        (save(np.full((8, 8), 128 * 257, np.uint16)), (128, 128, 128), 0),
        (save(np.full((8, 8), 300, np.uint16)), (1, 1, 1), 0),
        (save(np.full((8, 8), 128 * 257, np.uint16), "TIFF"), (128, 128, 128), 0),
        (save(np.full((8, 8), 128 * 257, ">u2"), "TIFF"), (128, 128, 128), 0),
        (save(np.full((8, 8), 128 * 257, np.int32), "TIFF"), (128, 128, 128), 0),
        (save(np.full((8, 8), 0.5, np.float32), "TIFF"), (128, 128, 128), 0),
    ],
)
def test_the_colour_of_a_plain_picture(file, colour, within):
    pixels = np.asarray(read_picture(file).rgb).astype(int)
    assert pixels.shape == (8, 8, 3)
    assert abs(pixels - colour).max() <= within


def test_sixteen_bits_of_grey_with_a_transparent_value():
    values = np.full((8, 8), 700, np.uint16)
    values[:4] = 30000
    whole = save(values)
    end = whole.index(b"IDAT") - 4
    file = whole[:end] + chunk(b"tRNS", (30000).to_bytes(2, "big")) + whole[end:]
    pixels = np.asarray(read_picture(file).rgb)
    assert (pixels[:4] == 255).all()
    assert (pixels[4:] == 3).all()


def test_premultiplied_and_plain_transparency_look_the_same():
    plain_file = save(plain((200, 100, 50, 128), "RGBA"), "TIFF")
    # TIFF's tag ExtraSamples: 1 is associated alpha, 2 is not
    tag = b"\x52\x01\x03\x00\x01\x00\x00\x00"
    premultiplied = save(plain((100, 50, 25, 128), "RGBA"), "TIFF")
    premultiplied = premultiplied.replace(tag + b"\x02", tag + b"\x01")
    one, other = (np.asarray(read_picture(f).rgb).astype(int) for f in (plain_file, premultiplied))
    assert abs(one - other).max() <= 2
    assert abs(one - (227, 177, 152)).max() <= 1


def test_alpha_that_is_kept_leaves_the_colours_below_it():
    pixels = np.dstack([colours(8, 8), np.arange(0, 256, 4, np.uint8).reshape(8, 8)])
    picture = read_picture(save(pixels), keep_alpha=True)
    assert np.array_equal(np.asarray(picture.rgb), pixels[..., :3])
    assert np.array_equal(np.asarray(picture.alpha), pixels[..., 3])
    white = np.asarray(read_picture(save(pixels)).rgb)
    assert (white[pixels[..., 3] == 0] == 255).all()


def test_masks_of_any_mode_are_grey():
    assert np.asarray(read_mask(save(plain(1, "1")))).tolist() == [[255] * 8] * 8
    assert np.asarray(read_mask(save(np.full((8, 8), 128 * 257, np.uint16)))).max() == 128
    assert np.asarray(read_mask(save(palette((0, 0, 0), (255, 255, 255))))).min() == 255
    assert np.asarray(read_mask(save(plain((200, 255), "LA")))).min() == 200

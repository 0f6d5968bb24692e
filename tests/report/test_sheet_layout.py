"""The layout of a sheet: images in their cells, labels under them, of any size and length."""

import numpy as np
import pytest
from PIL import Image

from sdbatch.errors import SdbatchError, StorageError
from sdbatch.report.sheet import GAP, IMAGE_SIDE, LINE_HEIGHT, MAX_HEIGHT, draw_sheet
from tests.sheets import BLUE, GREEN, RED, box, position, row


def difference_box(one, other):
    """Return left, top, right and bottom of the area where two pictures of one size differ."""
    assert one.size == other.size
    ys, xs = np.nonzero((np.asarray(one) != np.asarray(other)).any(-1))
    return xs.min(), ys.min(), xs.max() + 1, ys.max() + 1


def columns_are_white(picture, left, right, top):
    return bool((np.asarray(picture)[top:, left:right] == 255).all())


def test_sheet_names_the_image_that_is_damaged():
    with pytest.raises(StorageError, match="image 000000-000000: cannot be decoded"):
        draw_sheet([row(image={"bytes": b"\xff\xd8 half", "path": "x.jpg"})], "title", 1)


@pytest.mark.parametrize(
    ("size", "size_on_sheet"),
    [
        ((8, 8), (256, 256)),
        ((IMAGE_SIDE, IMAGE_SIDE), (IMAGE_SIDE, IMAGE_SIDE)),
        ((64, 128), (128, 256)),
        ((72, 48), (216, 144)),  # enlarged by a whole number, so pixels stay sharp
        ((97, 8), (194, 16)),
        ((512, 512), (256, 256)),
        ((512, 256), (256, 128)),
        ((256, 768), (85, 256)),
        ((4096, 8), (256, 1)),
        ((200, 200), (200, 200)),
    ],
)
def test_sheet_fits_an_image_of_any_size_into_its_cell(size, size_on_sheet):
    picture = draw_sheet([row(RED, size), row(BLUE)], "title", 2)
    left, top, right, bottom = box(picture, RED)

    assert (right - left, bottom - top) == size_on_sheet
    assert left == GAP
    assert bottom == box(picture, BLUE)[3]  # images are aligned at the bottom
    assert position(picture, BLUE)[0] == 2 * GAP + IMAGE_SIDE


def test_sheet_is_no_higher_than_its_images_and_labels():
    low, high = (
        draw_sheet([row(RED, size), row(GREEN, size)], "title", 1)
        for size in ((128, 100), (128, 128))
    )

    assert high.height == low.height + 2 * 2 * 28
    assert box(low, GREEN)[1] - box(low, RED)[3] == box(high, GREEN)[1] - box(high, RED)[3]


def test_sheet_writes_prompt_key_and_seed_under_an_image():
    rows = [row(RED), row(BLUE, prompt="a cat")]
    plain = draw_sheet(rows, "title", 2)
    _, _, _, bottom = box(plain, BLUE)
    for values in ({"prompt": "a cow"}, {"key": "000000-000001"}, {"seed": 8}):
        left, top, right, low = difference_box(
            plain, draw_sheet([rows[0], rows[1] | values], "title", 2)
        )
        assert 2 * GAP + IMAGE_SIDE <= left < right <= 2 * (GAP + IMAGE_SIDE)
        assert bottom < top < low <= plain.height


@pytest.mark.parametrize(
    "values",
    [
        {"sampler": "euler"},
        {"num_inference_steps": 5},
        {"guidance_scale": 2.0},
        {"negative_prompt": "blurred"},
    ],
)
def test_sheet_has_equal_settings_in_the_title_and_different_ones_in_the_labels(values):
    same = draw_sheet([row(RED), row(BLUE)], "title", 2)
    other = draw_sheet([row(RED, **values), row(BLUE, **values)], "title", 2)
    differing = draw_sheet([row(RED), row(BLUE, **values)], "title", 2)

    assert difference_box(same, other)[3] <= position(same, RED)[1]
    assert differing.height == same.height + LINE_HEIGHT


@pytest.mark.parametrize(
    "prompt",
    [
        "W" * 400,
        "MMMMMM " * 60,
        "a dog, " * 500,
        "二匹の猫 🐈 " * 40,
        "x\n\ny\ttab",
        "كلب",
        "\x00",
        "",
    ],
    ids=lambda prompt: prompt[:8].encode().hex(),
)
def test_sheet_keeps_a_prompt_of_any_length_under_its_image(prompt):
    picture = draw_sheet([row(RED, prompt=prompt), row(BLUE), row(GREEN)], "title", 3)
    _, _, _, bottom = box(picture, RED)

    assert columns_are_white(picture, GAP + IMAGE_SIDE + 1, GAP + IMAGE_SIDE + GAP, bottom)
    assert picture.height <= bottom + 4 * LINE_HEIGHT + 3 * GAP


def test_sheet_fills_three_lines_with_a_long_prompt():
    """A line ends where the width does, not after a fixed number of letters."""
    narrow = draw_sheet([row(prompt="i" * 100)], "title", 1)
    wide = draw_sheet([row(prompt="W" * 24)], "title", 1)

    assert narrow.height == wide.height  # of two lines each
    words = np.asarray(draw_sheet([row(prompt="it is " * 200)], "title", 1))
    assert (words[:, IMAGE_SIDE - 20 : IMAGE_SIDE] != 255).any(1).sum() > IMAGE_SIDE + 10


def test_sheet_keeps_a_long_seed_and_long_settings_under_the_image():
    long = {
        "seed": 2**63 - 1,
        "sampler": "dpmpp_2m_sde_exponential",
        "negative_prompt": "no " * 900,
    }
    picture = draw_sheet([row(RED, **long), row(BLUE)], "title", 2)
    _, _, _, bottom = box(picture, RED)

    assert columns_are_white(picture, GAP + IMAGE_SIDE + 1, GAP + IMAGE_SIDE + GAP, bottom)
    assert picture.height < bottom + 10 * LINE_HEIGHT


@pytest.mark.parametrize("count", [1, 3, 8])
def test_sheet_wraps_a_long_title(count):
    """A negative prompt of hundreds of words must not make the sheet wider."""
    title = "my job: a\nname of two lines, drawn by builtin:shapes, a trained model"
    rows = [row(RED, negative_prompt="blurred, ugly, " * 100) for _ in range(count)]
    picture = draw_sheet(rows, title, 6)
    _, top, _, _ = box(picture, RED)

    assert picture.width == max(4, min(count, 6)) * (IMAGE_SIDE + GAP) + GAP
    assert top == 2 * GAP + 3 * LINE_HEIGHT
    assert columns_are_white(picture, picture.width - GAP + 1, picture.width, 0)


def test_sheet_that_would_be_too_high_raises_with_the_way_out():
    rows = [row()] * (MAX_HEIGHT // IMAGE_SIDE)
    with pytest.raises(
        SdbatchError, match=r"--columns = 1: makes a sheet \d\d,\d{3} pixels high.*more"
    ):
        draw_sheet(rows, "title", 1)


def test_sheet_of_the_maximum_height_can_be_written_as_a_jpeg(tmp_path):
    """The limit is libjpeg's."""
    Image.new("RGB", (8, MAX_HEIGHT)).save(tmp_path / "high.jpg")
    with pytest.raises(OSError, match="when writing image file"):
        Image.new("RGB", (8, MAX_HEIGHT + 1)).save(tmp_path / "higher.jpg")

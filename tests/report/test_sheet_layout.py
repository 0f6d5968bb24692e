"""The sheet as a picture: images in their places, words under them, whatever size and length."""

import numpy as np
import pytest
from PIL import Image

from sdbatch.errors import SdbatchError, StorageError
from sdbatch.report.sheet import GAP, HIGHEST, LINE, SIDE, draw
from tests.sheets import BLUE, GREEN, RED, box, place, row


def changed(one, other):
    """Return where two pictures of one size differ."""
    assert one.size == other.size
    ys, xs = np.nonzero((np.asarray(one) != np.asarray(other)).any(-1))
    return xs.min(), ys.min(), xs.max() + 1, ys.max() + 1


def columns_are_white(picture, left, right, top):
    return bool((np.asarray(picture)[top:, left:right] == 255).all())


def test_sheet_names_the_image_that_is_damaged():
    with pytest.raises(StorageError, match="image 000000-000000 = no picture"):
        draw([row(image={"bytes": b"\xff\xd8 half", "path": "x.jpg"})], "title", 1)


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        ((8, 8), (256, 256)),
        ((SIDE, SIDE), (SIDE, SIDE)),
        ((64, 128), (128, 256)),
        ((72, 48), (216, 144)),  # by a whole number: pixels stay sharp
        ((97, 8), (194, 16)),
        ((512, 512), (256, 256)),
        ((512, 256), (256, 128)),
        ((256, 768), (85, 256)),
        ((4096, 8), (256, 1)),
        ((200, 200), (200, 200)),
    ],
)
def test_sheet_fits_an_image_of_any_size_into_its_place(size, shown):
    picture = draw([row(RED, size), row(BLUE)], "title", 2)
    left, top, right, bottom = box(picture, RED)

    assert (right - left, bottom - top) == shown
    assert left == GAP
    assert bottom == box(picture, BLUE)[3]  # all stand on one line
    assert place(picture, BLUE)[0] == 2 * GAP + SIDE


def test_sheet_is_no_higher_than_its_images_and_their_words():
    low, high = (
        draw([row(RED, size), row(GREEN, size)], "title", 1) for size in ((128, 100), (128, 128))
    )

    assert high.height == low.height + 2 * 2 * 28
    assert box(low, GREEN)[1] - box(low, RED)[3] == box(high, GREEN)[1] - box(high, RED)[3]


def test_sheet_writes_an_images_prompt_and_key_under_it():
    rows = [row(RED), row(BLUE, prompt="a cat")]
    plain = draw(rows, "title", 2)
    _, _, _, bottom = box(plain, BLUE)
    for values in ({"prompt": "a cow"}, {"key": "000000-000001"}, {"seed": 8}):
        left, top, right, low = changed(plain, draw([rows[0], rows[1] | values], "title", 2))
        assert 2 * GAP + SIDE <= left < right <= 2 * (GAP + SIDE)
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
def test_sheet_says_in_its_title_what_is_the_same_and_under_the_images_what_differs(values):
    same = draw([row(RED), row(BLUE)], "title", 2)
    other = draw([row(RED, **values), row(BLUE, **values)], "title", 2)
    differing = draw([row(RED), row(BLUE, **values)], "title", 2)

    assert changed(same, other)[3] <= place(same, RED)[1]
    assert differing.height == same.height + LINE


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
def test_sheet_keeps_a_prompt_under_its_image_however_long_it_is(prompt):
    picture = draw([row(RED, prompt=prompt), row(BLUE), row(GREEN)], "title", 3)
    _, _, _, bottom = box(picture, RED)

    assert columns_are_white(picture, GAP + SIDE + 1, GAP + SIDE + GAP, bottom)
    assert picture.height <= bottom + 4 * LINE + 3 * GAP


def test_sheet_writes_what_it_can_of_a_long_prompt():
    """Three lines, filled: the words that fit, not a fixed number of letters."""
    narrow = draw([row(prompt="i" * 100)], "title", 1)
    wide = draw([row(prompt="W" * 24)], "title", 1)

    assert narrow.height == wide.height  # of two lines each
    words = np.asarray(draw([row(prompt="it is " * 200)], "title", 1))
    assert (words[:, SIDE - 20 : SIDE] != 255).any(1).sum() > SIDE + 10


def test_sheet_keeps_a_long_seed_and_what_differs_under_the_image():
    long = {
        "seed": 2**63 - 1,
        "sampler": "dpmpp_2m_sde_exponential",
        "negative_prompt": "no " * 900,
    }
    picture = draw([row(RED, **long), row(BLUE)], "title", 2)
    _, _, _, bottom = box(picture, RED)

    assert columns_are_white(picture, GAP + SIDE + 1, GAP + SIDE + GAP, bottom)
    assert picture.height < bottom + 10 * LINE


@pytest.mark.parametrize("count", [1, 3, 8])
def test_sheet_breaks_its_title_when_it_is_long(count):
    """A negative prompt of hundreds of words is no reason for a sheet as wide as a street."""
    title = "my job: a\nname of two lines, drawn by builtin:shapes, a trained model"
    rows = [row(RED, negative_prompt="blurred, ugly, " * 100) for _ in range(count)]
    picture = draw(rows, title, 6)
    _, top, _, _ = box(picture, RED)

    assert picture.width == max(4, min(count, 6)) * (SIDE + GAP) + GAP
    assert top == 2 * GAP + 3 * LINE
    assert columns_are_white(picture, picture.width - GAP + 1, picture.width, 0)


def test_sheet_of_too_many_lines_is_refused_with_the_way_out():
    rows = [row()] * (HIGHEST // SIDE)
    with pytest.raises(SdbatchError, match=r"--columns 1 = a sheet \d\d,\d{3} pixels high: .*more"):
        draw(rows, "title", 1)


def test_highest_sheet_can_be_written_as_a_jpeg(tmp_path):
    """The limit is that of JPEG files as libjpeg writes them."""
    Image.new("RGB", (8, HIGHEST)).save(tmp_path / "high.jpg")
    with pytest.raises(OSError, match="when writing image file"):
        Image.new("RGB", (8, HIGHEST + 1)).save(tmp_path / "higher.jpg")

"""The sheet: chosen images side by side, each with its prompt, whatever their size and words."""

import io
import os

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from sdbatch import receipts
from sdbatch.errors import SdbatchError, StorageError
from sdbatch.report import sheet
from sdbatch.report.sheet import GAP, HIGHEST, LINE, SIDE, draw, make
from sdbatch.storage import Store, open_file
from tests.fakes import Painter
from tests.finished import finish, small_job

COLOURS = {  # prompt -> the colour that is drawn for it
    "a red dog": (230, 20, 20),
    "a green bird": (20, 200, 20),
    "a blue cat": (20, 20, 230),
    "a yellow fish": (230, 230, 20),
    "a cyan cow": (20, 230, 230),
}
RED, GREEN, BLUE, YELLOW, CYAN = COLOURS.values()
FORMATS = ("parquet", "webdataset")


def flat(colour, width=8, height=8):
    return np.full((height, width, 3), colour, np.uint8)


def row(colour=RED, size=(8, 8), **values):
    """Return the row of a drawn image, as an output has it."""
    file = io.BytesIO()
    Image.fromarray(flat(colour, *size)).save(file, "PNG")
    return {
        "key": "000000-000000",
        "prompt": "a dog",
        "seed": 7,
        "sampler": "ddim",
        "num_inference_steps": 4,
        "guidance_scale": 7.5,
        "negative_prompt": "",
        "image": {"bytes": file.getvalue(), "path": "000000-000000.png"},
    } | values


def box(picture, colour, away=0):
    """Return left, top, right, bottom of where `colour` is in the picture; None: nowhere."""
    found = (np.abs(np.asarray(picture).astype(int) - colour) <= away).all(-1)
    ys, xs = np.nonzero(found)
    return (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) if len(xs) else None


def place(picture, colour):
    """Return the column and the line, in pixels, of an image that fills its place; else fail."""
    left, top, right, bottom = box(picture, colour)
    assert (right - left, bottom - top) == (SIDE, SIDE)
    return left, top


def changed(one, other):
    """Return where two pictures of one size differ."""
    assert one.size == other.size
    ys, xs = np.nonzero((np.asarray(one) != np.asarray(other)).any(-1))
    return xs.min(), ys.min(), xs.max() + 1, ys.max() + 1


def columns_are_white(picture, left, right, top):
    return bool((np.asarray(picture)[top:, left:right] == 255).all())


@pytest.fixture
def output(make_job, tmp_path, request):
    """A finished output of 5 images in 3 shards, each in its colour; its format by parameter."""
    settings = {"format": getattr(request, "param", "parquet"), "image_format": "png"}
    job = small_job(make_job, tmp_path, list(COLOURS), output=settings)
    return finish(job, lambda: Painter({name: flat(COLOURS[name]) for name in COLOURS}))


def made(output, count=24, seed=None, where=(), columns=6, to=None):
    """Make a sheet; return it."""
    to = to or str(output.folder.parent / "sheet.png")
    path = make(output.store, count, seed, where, columns, to)
    assert path == to
    with Image.open(path) as picture:
        return picture.convert("RGB")


@pytest.mark.parametrize("output", FORMATS, indirect=True)
def test_sheet_shows_every_image_in_order_line_by_line(output):
    picture = made(output, columns=2)
    (left, top), (right, _), (_, second), *_ = places = [
        place(picture, colour) for colour in COLOURS.values()
    ]

    assert (left, right) == (GAP, 2 * GAP + SIDE)
    assert places == [
        (left, top),
        (right, top),
        (left, second),
        (right, second),
        (left, 2 * second - top),
    ]
    assert second >= top + SIDE + 2 * LINE  # room for a prompt and a key
    assert picture.height >= places[-1][1] + SIDE + 2 * LINE


def test_sheet_shows_the_first_images_when_there_are_more(output):
    picture = made(output, count=3)

    assert [place(picture, colour)[1] for colour in (RED, GREEN, BLUE)] == [
        place(picture, RED)[1]
    ] * 3
    assert box(picture, YELLOW) is box(picture, CYAN) is None


def test_sheet_shows_random_images_in_order_and_the_same_ones_for_a_seed(output):
    pictures = [made(output, count=2, seed=seed) for seed in (0, 0, *range(1, 9))]
    shown = [tuple(c for c in COLOURS.values() if box(each, c)) for each in pictures]

    assert shown[0] == shown[1]
    assert len(set(shown)) > 2
    for picture, (one, other) in zip(pictures, shown, strict=True):
        assert place(picture, one)[0] < place(picture, other)[0]


def test_sheet_shows_the_images_that_fulfil_the_conditions(output):
    picture = made(output, where=["prompt~c", "prompt~blue"])

    assert place(picture, BLUE)[0] == GAP
    assert [box(picture, colour) for colour in (RED, GREEN, YELLOW, CYAN)] == [None] * 4


def test_sheet_shows_one_image_alone(output):
    picture = made(output, count=1)

    assert place(picture, RED)[0] == GAP
    assert picture.width <= 4 * (SIDE + GAP) + GAP  # of the title, which is longer


def test_sheet_goes_into_the_output_as_jpeg_when_no_file_is_named(output):
    path = make(output.store, 24, None, [], 6, None)

    assert path == f"{output.store.url}/gallery/sheet.jpg"
    with Image.open(path) as picture:
        assert picture.format == "JPEG"
        left, top, right, bottom = box(picture, CYAN, away=6)
    assert abs(left - 4 * (SIDE + GAP) - GAP) < 4  # JPEG blurs edges
    assert abs(right - left - SIDE) < 8
    assert abs(bottom - top - SIDE) < 8


@pytest.mark.parametrize(
    ("name", "kind"),
    [("s.jpg", "JPEG"), ("s.JPEG", "JPEG"), ("new/folder/s.png", "PNG"), ("猫 's.png", "PNG")],
)
def test_sheet_goes_where_it_is_told_in_the_format_of_the_suffix(output, name, kind, tmp_path):
    path = make(output.store, 1, None, [], 6, str(tmp_path / name))

    assert path == str(tmp_path / name)
    with Image.open(path) as picture:
        assert picture.format == kind
    assert not output.store.names("gallery").get("sheet.jpg")


def test_sheet_goes_into_the_current_folder_when_the_file_has_none(output, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    assert make(output.store, 1, None, [], 6, "one.png") == str(tmp_path / "one.png")
    assert (tmp_path / "one.png").exists()


@pytest.mark.parametrize("url", ["memory://sheet.png", "memory://folder/sheet.png"])
def test_sheet_goes_to_a_url(output, url):
    assert make(output.store, 1, None, [], 6, url) == url
    with open_file(url) as file, Image.open(file) as picture:
        assert picture.format == "PNG"


def test_sheet_of_a_running_output_shows_what_is_committed(output):
    receipts.withdraw(output.store, output.receipts[0])
    (output.folder / "manifest.parquet").unlink()
    picture = made(output)

    assert place(picture, BLUE)[0] == GAP
    assert box(picture, RED) is box(picture, GREEN) is None


def test_sheet_shows_the_images_of_an_output_with_failed_shards(make_job, tmp_path):
    prompts = ["fail", "fail", "a red dog", "fail", "fail", "fail", "a blue cat"]
    job = small_job(make_job, tmp_path, prompts, output={"image_format": "png"})
    picture = made(finish(job, lambda: Painter({n: flat(c) for n, c in COLOURS.items()})))

    assert place(picture, RED)[0] < place(picture, BLUE)[0]


@pytest.mark.parametrize("to", ["sheet.gif", "sheet", ".png", "", "jpg", "out/"])
def test_sheet_refuses_a_file_of_another_kind_before_it_looks_for_the_output(to, tmp_path):
    with pytest.raises(SdbatchError, match=r"--to '.*': must end with \.jpg, \.jpeg, \.png"):
        make(Store(str(tmp_path / "nothing")), 1, None, [], 6, to)


def test_sheet_refuses_a_condition_before_it_looks_for_the_output(tmp_path):
    with pytest.raises(SdbatchError, match="--where 'dog': must be a column"):
        make(Store(str(tmp_path / "nothing")), 1, None, ["dog"], 6, None)


def test_sheet_of_no_output_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(StorageError, match=r"no job\.yaml: must be the output of a job"):
        make(Store(str(tmp_path / "nothing")), 1, None, [], 6, str(tmp_path / "s.png"))
    assert list(tmp_path.iterdir()) == []


def test_sheet_of_no_image_is_refused(make_job, tmp_path):
    output = finish(small_job(make_job, tmp_path, ["fail"]))
    with pytest.raises(StorageError, match="no image yet"):
        make(output.store, 1, None, [], 6, None)


@pytest.mark.parametrize("seed", [None, 0])
def test_sheet_is_refused_when_no_image_fits(output, seed):
    with pytest.raises(
        SdbatchError, match="--where prompt~dog and width=9 = no image: must fit one"
    ):
        made(output, seed=seed, where=["prompt~dog", "width=9"])


def test_sheet_says_why_when_it_cannot_be_written(output, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(StorageError, match=r"file/s\.png = "):
        make(output.store, 1, None, [], 6, str(tmp_path / "file" / "s.png"))
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(StorageError, match=r"folder\.png = Is a directory"):
        make(output.store, 1, None, [], 6, str(tmp_path / "folder.png"))
    with pytest.raises(StorageError, match=r"foo://bucket/s\.png = Protocol not known"):
        make(output.store, 1, None, [], 6, "foo://bucket/s.png")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_sheet_says_so_when_it_may_not_be_written(output, tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    with pytest.raises(StorageError, match=r"s\.png = Permission denied: .*an output writable"):
        make(output.store, 1, None, [], 6, str(folder / "s.png"))


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


def test_sheet_of_a_table_of_one_prompt_in_many_values_shows_them_all(make_job, tmp_path):
    table = pa.table(
        {
            "prompt": ["a red dog"] * 4,
            "guidance_scale": [1.0, 2.5, 7.5, 12.0],
            "height": [8, 16, 8, 200],
            "width": [8, 8, 16, 400],
        }
    )
    output = finish(small_job(make_job, tmp_path, table))

    assert made(output).width == 4 * (SIDE + GAP) + GAP


def test_sheet_of_too_many_lines_is_refused_with_the_way_out():
    rows = [row()] * (HIGHEST // SIDE)
    with pytest.raises(SdbatchError, match=r"--columns 1 = a sheet \d\d,\d{3} pixels high: .*more"):
        draw(rows, "title", 1)


def test_highest_sheet_can_be_written_as_a_jpeg(tmp_path):
    """The limit is that of JPEG files as libjpeg writes them."""
    Image.new("RGB", (8, HIGHEST)).save(tmp_path / "high.jpg")
    with pytest.raises(OSError, match="when writing image file"):
        Image.new("RGB", (8, HIGHEST + 1)).save(tmp_path / "higher.jpg")


def test_sheet_is_replaced_when_it_is_made_again(output):
    first = make(output.store, 5, None, [], 6, None)
    assert make(output.store, 1, None, [], 6, None) == first
    with Image.open(first) as picture:
        assert box(picture, GREEN, away=6) is None
    assert set(output.store.names("gallery")) == {"index.html", sheet.SHEET_FILE.split("/")[1]}

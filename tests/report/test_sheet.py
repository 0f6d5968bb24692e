"""The sheet: which images it shows, where it is written, its layout, its errors."""

import os
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from sdbatch.errors import SdbatchError, StorageError
from sdbatch.output import names
from sdbatch.report.sheet import (
    GAP,
    IMAGE_SIDE,
    LINE_HEIGHT,
    MAX_HEIGHT,
    draw_sheet,
    make_animation,
    make_sheet,
)
from sdbatch.storage import Store, open_file
from tests.fakes import FakeEngine, Painter
from tests.finished import finish, small_job
from tests.sheets import BLUE, GREEN, RED, box, flat_image, position, row

YELLOW, CYAN = (230, 230, 20), (20, 230, 230)
COLOURS = {  # prompt -> colour of its image
    "a red dog": RED,
    "a green bird": GREEN,
    "a blue cat": BLUE,
    "a yellow fish": YELLOW,
    "a cyan cow": CYAN,
}
FORMATS = ("parquet", "webdataset")


@pytest.fixture
def output(make_job, tmp_path, request):
    """A finished output of 5 images in 3 shards, each in its colour; its format by parameter."""
    settings = {"format": getattr(request, "param", "parquet"), "image_format": "png"}
    job = small_job(make_job, tmp_path, list(COLOURS), output=settings)
    return finish(job, lambda: Painter({name: flat_image(COLOURS[name]) for name in COLOURS}))


def read_sheet(output, count=24, seed=None, where=(), columns=6, to=None):
    """Make a sheet and read it back."""
    to = to or str(output.folder.parent / "sheet.png")
    path = make_sheet(output.store, count, seed, where, columns, to)
    assert path == to
    with Image.open(path) as picture:
        return picture.convert("RGB")


@pytest.mark.parametrize("output", FORMATS, indirect=True)
def test_sheet_shows_every_image_in_order_line_by_line(output):
    picture = read_sheet(output, columns=2)
    (left, top), (right, _), (_, second), *_ = positions = [
        position(picture, colour) for colour in COLOURS.values()
    ]

    assert (left, right) == (GAP, 2 * GAP + IMAGE_SIDE)
    assert positions == [
        (left, top),
        (right, top),
        (left, second),
        (right, second),
        (left, 2 * second - top),
    ]
    assert second >= top + IMAGE_SIDE + 2 * LINE_HEIGHT  # space for a prompt and a key
    assert picture.height >= positions[-1][1] + IMAGE_SIDE + 2 * LINE_HEIGHT


def test_sheet_shows_the_first_images_when_there_are_more(output):
    picture = read_sheet(output, count=3)

    assert [position(picture, colour)[1] for colour in (RED, GREEN, BLUE)] == [
        position(picture, RED)[1]
    ] * 3
    assert box(picture, YELLOW) is box(picture, CYAN) is None


def test_sheet_shows_random_images_in_order_and_the_same_ones_for_a_seed(output):
    pictures = [read_sheet(output, count=2, seed=seed) for seed in (0, 0, *range(1, 9))]
    choices = [tuple(c for c in COLOURS.values() if box(each, c)) for each in pictures]

    assert choices[0] == choices[1]
    assert len(set(choices)) > 2
    for picture, (first, second) in zip(pictures, choices, strict=True):
        assert position(picture, first)[0] < position(picture, second)[0]


def test_sheet_shows_the_images_that_match_the_conditions(output):
    picture = read_sheet(output, where=["prompt~c", "prompt~blue"])

    assert position(picture, BLUE)[0] == GAP
    assert [box(picture, colour) for colour in (RED, GREEN, YELLOW, CYAN)] == [None] * 4


def test_sheet_shows_one_image_alone(output):
    picture = read_sheet(output, count=1)

    assert position(picture, RED)[0] == GAP
    assert picture.width <= 4 * (IMAGE_SIDE + GAP) + GAP  # the title's, which is wider


def test_sheet_is_a_jpeg_in_the_output_when_no_file_is_named(output):
    path = make_sheet(output.store, 24, None, [], 6, None)

    assert path == f"{output.store.url}/gallery/sheet.jpg"
    with Image.open(path) as picture:
        assert picture.format == "JPEG"
        left, top, right, bottom = box(picture, CYAN, tolerance=6)
    assert abs(left - 4 * (IMAGE_SIDE + GAP) - GAP) < 4  # JPEG blurs edges
    assert abs(right - left - IMAGE_SIDE) < 8
    assert abs(bottom - top - IMAGE_SIDE) < 8


@pytest.mark.parametrize(
    ("name", "image_format"),
    [("s.jpg", "JPEG"), ("s.JPEG", "JPEG"), ("new/folder/s.png", "PNG"), ("猫 's.png", "PNG")],
)
def test_sheet_is_written_to_the_named_file_in_the_format_of_its_suffix(
    output, name, image_format, tmp_path
):
    path = make_sheet(output.store, 1, None, [], 6, str(tmp_path / name))

    assert path == str(tmp_path / name)
    with Image.open(path) as picture:
        assert picture.format == image_format
    assert not output.store.names("gallery").get("sheet.jpg")


def test_sheet_is_written_to_the_current_folder_when_the_file_has_none(
    output, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)

    assert make_sheet(output.store, 1, None, [], 6, "one.png") == str(tmp_path / "one.png")
    assert (tmp_path / "one.png").exists()


@pytest.mark.parametrize("url", ["memory://sheet.png", "memory://folder/sheet.png"])
def test_sheet_is_written_to_a_url(output, url):
    assert make_sheet(output.store, 1, None, [], 6, url) == url
    with open_file(url) as file, Image.open(file) as picture:
        assert picture.format == "PNG"


def test_sheet_of_a_running_output_shows_committed_images(output):
    output.store.remove(names.receipt_file(0))
    (output.folder / "manifest.parquet").unlink()
    picture = read_sheet(output)

    assert position(picture, BLUE)[0] == GAP
    assert box(picture, RED) is box(picture, GREEN) is None


def test_sheet_shows_the_images_of_an_output_with_failed_shards(make_job, tmp_path):
    prompts = ["fail", "fail", "a red dog", "fail", "fail", "fail", "a blue cat"]
    job = small_job(make_job, tmp_path, prompts, output={"image_format": "png"})
    picture = read_sheet(
        finish(job, lambda: Painter({n: flat_image(c) for n, c in COLOURS.items()}))
    )

    assert position(picture, RED)[0] < position(picture, BLUE)[0]


@pytest.mark.parametrize("to", ["sheet.gif", "sheet", ".png", "", "jpg", "out/"])
def test_sheet_rejects_an_unknown_file_format_before_it_opens_the_output(to, tmp_path):
    with pytest.raises(SdbatchError, match=r"--to = '.*': must end with \.jpg, \.jpeg, \.png"):
        make_sheet(Store(str(tmp_path / "nothing")), 1, None, [], 6, to)


def test_sheet_rejects_an_invalid_condition_before_it_opens_the_output(tmp_path):
    with pytest.raises(SdbatchError, match="--where = 'dog': must be a column"):
        make_sheet(Store(str(tmp_path / "nothing")), 1, None, ["dog"], 6, None)


def test_sheet_raises_and_writes_nothing_when_there_is_no_output(tmp_path):
    with pytest.raises(StorageError, match=r"no job\.yaml: must be the output of a job"):
        make_sheet(Store(str(tmp_path / "nothing")), 1, None, [], 6, str(tmp_path / "s.png"))
    assert list(tmp_path.iterdir()) == []


def test_sheet_raises_when_the_output_has_no_image(make_job, tmp_path):
    output = finish(small_job(make_job, tmp_path, ["fail"]))
    with pytest.raises(StorageError, match="has no image yet"):
        make_sheet(output.store, 1, None, [], 6, None)


@pytest.mark.parametrize("seed", [None, 0])
def test_sheet_raises_when_no_image_matches(output, seed):
    with pytest.raises(
        SdbatchError, match=r"No image matches --where prompt~dog and width=9\. Change or remove"
    ):
        read_sheet(output, seed=seed, where=["prompt~dog", "width=9"])


def test_sheet_raises_when_its_file_cannot_be_written(output, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(StorageError, match=r"/file = File exists"):
        make_sheet(output.store, 1, None, [], 6, str(tmp_path / "file" / "s.png"))
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(StorageError, match=r"folder\.png = Is a directory"):
        make_sheet(output.store, 1, None, [], 6, str(tmp_path / "folder.png"))
    with pytest.raises(StorageError, match=r"foo://bucket/s\.png = Protocol not known"):
        make_sheet(output.store, 1, None, [], 6, "foo://bucket/s.png")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_sheet_raises_when_its_folder_is_read_only(output, tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    with pytest.raises(StorageError, match=r"s\.png = Permission denied: .*an output writable"):
        make_sheet(output.store, 1, None, [], 6, str(folder / "s.png"))


def test_sheet_shows_all_images_when_one_prompt_has_many_settings(make_job, tmp_path):
    table = pa.table(
        {
            "prompt": ["a red dog"] * 4,
            "guidance_scale": [1.0, 2.5, 7.5, 12.0],
            "height": [8, 16, 8, 200],
            "width": [8, 8, 16, 400],
        }
    )
    output = finish(small_job(make_job, tmp_path, table))

    assert read_sheet(output).width == 4 * (IMAGE_SIDE + GAP) + GAP


def test_sheet_replaces_the_previous_one(output):
    first = make_sheet(output.store, 5, None, [], 6, None)
    assert make_sheet(output.store, 1, None, [], 6, None) == first
    with Image.open(first) as picture:
        assert box(picture, GREEN, tolerance=6) is None
    assert set(output.store.names("gallery")) == {"index.html", names.SHEET.split("/")[1]}


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


class Fading(FakeEngine):
    """Draws red at mix 0, green between and blue at mix 1; "fail" fails in the middle."""

    def _draw(self, request):
        if request.prompt == "fail" and 0 < request.mix < 1:
            raise ValueError("this prompt cannot be drawn")
        colour = RED if request.mix == 0 else BLUE if request.mix == 1 else GREEN
        drawn = super()._draw(request.model_copy(update={"prompt": "a dog"}))
        return replace(drawn, image=flat_image(colour))


@pytest.fixture
def sequences(make_job, tmp_path):
    """A finished output of 3 sequences of 3 images."""
    settings = {"image_format": "png", "images_per_shard": 5}
    prompts = {"frames": 3}
    names = ["a dog", "fail", "a cat"]
    return finish(small_job(make_job, tmp_path, names, prompts=prompts, output=settings), Fading)


def colours_of(path, places):
    """Return the colour at some places of each frame."""
    with Image.open(path) as picture:
        for frame in range(picture.n_frames):
            picture.seek(frame)
            pixels = np.asarray(picture.convert("RGB"), int)
            found = [pixels[y + 20, x + 20] for x, y in places]
            near = [min((RED, GREEN, BLUE), key=lambda c, p=p: abs(p - c).sum()) for p in found]
            yield near


def test_an_animated_sheet_shows_the_sequences_side_by_side(sequences):
    path = make_animation(sequences.store, 24, None, (), 6, None)
    assert path == f"{sequences.folder}/{names.ANIMATION}"
    with Image.open(path) as picture:
        assert (picture.n_frames, picture.info["loop"]) == (3, 0)
        top = box(picture.convert("RGB"), RED, 20)[1]
    places = [(GAP + number * (IMAGE_SIDE + GAP), top) for number in range(3)]
    dog, failed, cat = zip(*colours_of(path, places), strict=True)
    assert dog == cat == (RED, GREEN, BLUE)
    assert failed == (RED, RED, BLUE)  # what was not drawn is as before


def test_sequences_are_chosen_by_their_first_images(sequences, tmp_path):
    to = str(tmp_path / "new" / "cats.webp")
    assert make_animation(sequences.store, 24, 7, ["prompt~cat"], 6, to) == to
    with Image.open(to) as picture:
        assert picture.width < 4 * (IMAGE_SIDE + GAP) + 2 * GAP
    with pytest.raises(SdbatchError, match="No sequence matches"):
        make_animation(sequences.store, 24, None, ["prompt~cow"], 6, to)


def test_an_animation_is_a_webp_file(sequences, tmp_path):
    with pytest.raises(SdbatchError, match=r"must end with \.webp"):
        make_animation(sequences.store, 24, None, (), 6, str(tmp_path / "a.gif"))


def test_an_output_without_sequences_has_no_animation(output):
    with pytest.raises(SdbatchError, match=r"no sequences: .*prompts\.frames"):
        make_animation(output.store, 24, None, (), 6, None)

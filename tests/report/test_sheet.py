"""The sheet as a file: which images it shows, where it is written, what is refused."""

import os

import pyarrow as pa
import pytest
from PIL import Image

from sdbatch.errors import SdbatchError, StorageError
from sdbatch.output import receipts
from sdbatch.report import sheet
from sdbatch.report.sheet import GAP, LINE, SIDE, make
from sdbatch.storage import Store, open_file
from tests.fakes import Painter
from tests.finished import finish, small_job
from tests.sheets import BLUE, GREEN, RED, box, flat, place

YELLOW, CYAN = (230, 230, 20), (20, 230, 230)
COLOURS = {  # prompt -> the colour that is drawn for it
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


def test_sheet_is_replaced_when_it_is_made_again(output):
    first = make(output.store, 5, None, [], 6, None)
    assert make(output.store, 1, None, [], 6, None) == first
    with Image.open(first) as picture:
        assert box(picture, GREEN, away=6) is None
    assert set(output.store.names("gallery")) == {"index.html", sheet.SHEET_FILE.split("/")[1]}

"""The images of an output: all in order, by number, while the output is drawn, damaged."""

import io
import struct
import tarfile

import pytest

from sdbatch.errors import StorageError
from sdbatch.output import names
from sdbatch.output.reader import Images, open_images, open_picture
from sdbatch.storage import Store
from tests.finished import PROMPTS, SIDE, finish, small_job

FORMATS = ("parquet", "webdataset")
SUFFIX = {"parquet": "parquet", "webdataset": "tar"}
DRAWN = [prompt for prompt in PROMPTS if prompt != "fail"]
# Shards of 2 images: all failed, one failed, none failed, all failed, one.
GAPS = ("fail", "fail", "dog 0", "fail", "dog 1", "dog 2", "fail", "fail", "dog 3")

# Each returns what is left of a file.
DAMAGES = (
    lambda data: b"",
    lambda data: data[: len(data) // 3],
    bytes.swapcase,
    lambda data: bytes(len(data)),
)


@pytest.fixture(params=FORMATS)
def output_format(request):
    return request.param


@pytest.fixture
def complete(output_format, make_job, tmp_path):
    """A finished output of 3 shards with 4 images; rows of the first two failed."""
    return finish(small_job(make_job, tmp_path, output={"format": output_format}))


@pytest.fixture
def gaps(output_format, make_job, tmp_path):
    """A finished output of which two shards have no data file."""
    return finish(small_job(make_job, tmp_path, GAPS, output={"format": output_format}))


def prompts(rows):
    return [row["prompt"] for row in rows]


def test_images_are_the_drawn_ones_in_order(complete):
    images = open_images(complete.store)

    assert len(images) == 4
    assert prompts(images.rows()) == DRAWN
    assert images.job == complete.plan.job


def test_images_are_in_order_when_a_shard_has_none(gaps):
    images = open_images(gaps.store)

    assert len(images) == 4
    assert prompts(images.rows()) == ["dog 0", "dog 1", "dog 2", "dog 3"]


@pytest.mark.parametrize("numbers", [[0], [3], [0, 1, 2, 3], [2, 0], [3, 3, 1], range(1, 3), []])
def test_images_are_read_by_number(gaps, numbers):
    rows = open_images(gaps.store).rows_at(numbers)

    assert prompts(rows) == [f"dog {number}" for number in sorted(set(numbers))]
    assert [open_picture(row).size for row in rows] == [(SIDE, SIDE)] * len(rows)


def test_images_are_read_by_number_from_large_shards(make_job, tmp_path):
    table = [f"dog {number}" for number in range(150)]
    output = finish(small_job(make_job, tmp_path, table, output={"images_per_shard": 70}))

    assert prompts(open_images(output.store).rows_at([149, 0, 69, 70])) == [
        "dog 0",
        "dog 69",
        "dog 70",
        "dog 149",
    ]


def test_images_have_only_the_requested_columns_in_parquet(make_job, tmp_path):
    images = open_images(finish(small_job(make_job, tmp_path)).store)

    assert [list(row) for row in images.rows(["prompt", "seed"])] == [["prompt", "seed"]] * 4
    assert list(images.rows_at([0])[0]) == list(next(images.rows()))


def test_images_have_the_requested_columns_in_any_format(complete):
    images = open_images(complete.store)

    for row, full_row in zip(images.rows(["sha256", "key"]), images.rows(), strict=True):
        assert (row["sha256"], row["key"]) == (full_row["sha256"], full_row["key"])


def test_images_are_those_of_committed_shards_while_the_output_is_drawn(complete):
    complete.store.remove(names.receipt_file(1))
    complete.store.remove("manifest.parquet")
    images = open_images(complete.store)

    assert len(images) == 3
    assert prompts(images.rows()) == [DRAWN[0], *DRAWN[2:]]
    assert prompts(images.rows_at([1])) == [DRAWN[2]]


def test_open_images_raises_when_there_is_no_output(tmp_path):
    with pytest.raises(StorageError, match=r"nothing = no job\.yaml: must be the output of a job"):
        open_images(Store(str(tmp_path / "nothing")))


def test_open_images_raises_when_no_shard_is_committed_yet(complete):
    for shard in range(3):
        complete.store.remove(names.receipt_file(shard))

    with pytest.raises(
        StorageError, match=r"out has no image yet: .*`sdbatch status .*out` to see"
    ):
        open_images(complete.store)


def test_open_images_raises_when_every_row_failed(make_job, tmp_path):
    output = finish(small_job(make_job, tmp_path, ["fail"] * 3))

    with pytest.raises(
        StorageError, match=r"has no image yet: no shard with a drawn image is committed"
    ):
        open_images(output.store)


@pytest.mark.parametrize("content", [b"{", b"", b"[]"])
def test_images_of_a_shard_whose_receipt_proves_nothing_are_left_out(complete, content):
    complete.store.put(names.receipt_file(1), content)
    images = open_images(complete.store)

    assert len(images) == 3
    assert prompts(images.rows()) == [DRAWN[0], *DRAWN[2:]]


def test_open_images_raises_when_the_plan_is_lost(complete):
    complete.store.remove(names.PLAN)

    with pytest.raises(
        StorageError, match=r"^plan\.parquet = missing or damaged.*Run the job again"
    ):
        open_images(complete.store)


@pytest.mark.parametrize("damage", DAMAGES)
def test_rows_of_a_damaged_file_raise_with_its_name_and_the_way_out(
    complete, output_format, damage
):
    name = f"data/000002.{SUFFIX[output_format]}"
    complete.store.put(name, damage(complete.store.read(name)))

    with pytest.raises(StorageError) as raised:
        list(open_images(complete.store).rows())
    assert f"{name}: cannot be read (" in str(raised.value)
    assert f"`sdbatch verify {complete.store.url}`" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_rows_of_a_tar_that_ends_between_two_images_raise(make_job, tmp_path):
    settings = {"format": "webdataset", "images_per_shard": 100}
    store = finish(small_job(make_job, tmp_path, ["dog"] * 3, output=settings)).store
    (name,) = (f"data/{name}" for name in store.names("data"))
    data = store.read(name)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        second = next(member for member in tar if member.name.startswith("000000-000001"))
    store.put(name, data[: second.offset])

    with pytest.raises(StorageError, match=r"cannot be read \(1 images instead of 3\)"):
        list(open_images(store).rows())


def test_rows_of_a_missing_file_raise_with_its_name(complete, output_format):
    complete.store.remove(f"data/000002.{SUFFIX[output_format]}")

    with pytest.raises(StorageError, match=r"data/000002\.\w+ = No such file.*must be there"):
        list(open_images(complete.store).rows())


@pytest.mark.parametrize("image_format", ["jpg", "png", "webp"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_picture_raises_with_its_key(image_format, damage, make_job, tmp_path):
    job = small_job(make_job, tmp_path, output={"image_format": image_format})
    (row,) = open_images(finish(job).store).rows_at([1])
    row["image"]["bytes"] = damage(row["image"]["bytes"])

    with pytest.raises(
        StorageError, match=r"image 000001-000000: cannot be decoded .*`sdbatch verify`"
    ):
        open_picture(row)


@pytest.mark.parametrize("side", [struct.pack(">I", 2**30), b""], ids=["bomb", "truncated"])
def test_png_with_a_damaged_header_raises_with_its_key(side, make_job, tmp_path):
    job = small_job(make_job, tmp_path, output={"image_format": "png"})
    (row,) = open_images(finish(job).store).rows_at([1])
    data = row["image"]["bytes"]
    at = data.index(b"IHDR") + 4
    header = data[: at - 8] + struct.pack(">I", 5) + data[at - 4 :]
    row["image"]["bytes"] = data[:at] + side * 2 + data[at + 8 :] if side else header

    with pytest.raises(StorageError, match=r"image 000001-000000: cannot be decoded"):
        open_picture(row)


def test_images_are_empty_without_a_receipt(make_job, tmp_path):
    job = small_job(make_job, tmp_path)
    images = Images(Store(job.output.path), job, ())

    assert (len(images), list(images.rows()), images.rows_at([])) == (0, [], [])

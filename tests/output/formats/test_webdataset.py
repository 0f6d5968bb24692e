"""A shard as a WebDataset tar: what reads it, what its JSON holds, what its bytes depend on."""

import base64
import datetime
import decimal
import io
import json
import math
import tarfile

import pyarrow as pa
import pytest

from sdbatch import schema
from sdbatch.job import Output
from sdbatch.output import formats, image_file
from sdbatch.output.formats import webdataset
from tests.finished import drawn

NOON = datetime.datetime(2024, 2, 29, 12, 30, 15, 123456)
UTC = datetime.UTC


def write(rows, image_format):
    return webdataset.write(rows, Output(path="unused", image_format=image_format))


def members(data):
    """Return (name, bytes) of the members, in order."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return [(member.name, tar.extractfile(member).read()) for member in tar]


def said(rows):
    """Return what the JSON of each image says."""
    return [
        json.loads(data, parse_constant=pytest.fail)
        for name, data in members(write(rows, "jpg"))
        if name.endswith(".json")
    ]


def plain(rows):
    """Return the rows as their JSON must have them, where no value needs another form."""
    return rows.drop_columns(["image"]).to_pylist()


@pytest.fixture
def shard(tmp_path):
    """A shard file, as (its table, its path)."""
    rows = drawn(tags=pa.array([["a", "b"], [], None]))
    path = tmp_path / "data" / "000000.tar"
    path.parent.mkdir()
    path.write_bytes(write(rows, "jpg"))
    return rows, path


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset's own
@pytest.mark.parametrize("image_format", ["jpg", "png", "webp"])
def test_webdataset_opens_with_webdataset_and_the_image_is_a_picture(image_format, tmp_path):
    import webdataset as other

    rows = drawn(image_format=image_format)
    path = tmp_path / "000000.tar"
    path.write_bytes(write(rows, image_format))
    found = list(other.WebDataset(str(path), shardshuffle=False).decode("pil"))

    assert [sample["__key__"] for sample in found] == rows["key"].to_pylist()
    assert [sample["txt"] for sample in found] == rows["prompt"].to_pylist()
    assert [sample["json"] for sample in found] == plain(rows)
    assert [sample[image_format].size for sample in found] == [(8, 8)] * 3


def test_webdataset_opens_with_datasets_and_the_image_is_a_picture(shard, tmp_path):
    import datasets
    from PIL import Image

    rows, path = shard
    found = datasets.load_dataset(
        "webdataset", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache")
    )

    assert isinstance(found[0]["jpg"], Image.Image)
    assert found[0]["jpg"].size == (8, 8)
    assert found["__key__"][:] == rows["key"].to_pylist()
    assert found["txt"][:] == rows["prompt"].to_pylist()
    assert found["json"][:] == plain(rows)


def test_webdataset_has_an_images_members_side_by_side(shard):
    rows, path = shard

    assert [name for name, _ in members(path.read_bytes())] == [
        f"{key}.{suffix}" for key in rows["key"].to_pylist() for suffix in ("jpg", "json", "txt")
    ]


def test_webdataset_holds_the_image_file_and_the_prompt_as_they_are(shard):
    rows, path = shard
    found = dict(members(path.read_bytes()))

    for row in rows.to_pylist():
        assert found[f"{row['key']}.jpg"] == row["image"]["bytes"]
        assert found[f"{row['key']}.txt"].decode() == row["prompt"]
        assert image_file.read_parameters(found[f"{row['key']}.jpg"])["prompt"] == row["prompt"]


def test_webdataset_says_in_json_all_columns_but_the_image(shard):
    rows, _ = shard

    assert said(rows) == plain(rows)
    assert list(said(rows)[0]) == [name for name in rows.column_names if name != "image"]


def test_webdataset_holds_no_time_owner_or_mode_of_this_run(shard):
    with tarfile.open(shard[1]) as tar:
        facts = {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode, m.type) for m in tar}

    assert facts == {(0, 0, 0, "", "", 0o644, tarfile.REGTYPE)}


@pytest.mark.parametrize(
    ("value", "of_type", "text"),
    [
        (NOON, pa.timestamp("us"), "2024-02-29T12:30:15.123456"),
        (NOON.replace(tzinfo=UTC), pa.timestamp("us", "UTC"), "2024-02-29T12:30:15.123456+00:00"),
        (1, pa.timestamp("ns"), "1970-01-01T00:00:00.000000001"),
        (NOON.date(), pa.date32(), "2024-02-29"),
        (NOON.time(), pa.time64("us"), "12:30:15.123456"),
        (b"\x00\xff\x10", pa.binary(), base64.b64encode(b"\x00\xff\x10").decode()),
        (math.nan, pa.float64(), None),
        (math.inf, pa.float32(), None),
        (-math.inf, pa.float64(), None),
        (decimal.Decimal("12.50"), pa.decimal128(6, 2), "12.50"),
        (2**63 - 1, pa.int64(), 2**63 - 1),
        (0.1, pa.float64(), 0.1),
        (True, pa.bool_(), True),
        ("猫 \x00 \"'\n\u2028", pa.string(), "猫 \x00 \"'\n\u2028"),
        (None, pa.string(), None),
        ([("a", 1)], pa.map_(pa.string(), pa.int64()), [{"key": "a", "value": 1}]),
        (2**64 - 1, pa.uint64(), 2**64 - 1),
        (1.5, pa.float16(), 1.5),
        # 400 years have 146,097 days: these dates follow from those that Python has
        (2**53, pa.timestamp("s"), "285428751-11-12T07:36:32"),
        (-(2**40), pa.timestamp("s"), "-32873-11-12T23:23:44"),
        (253402300800, pa.timestamp("s", "UTC"), "10000-01-01T00:00:00+00:00"),
        (1, pa.timestamp("us", "Mars/Olympus"), "1970-01-01T00:00:00.000001+00:00"),
        (0, pa.timestamp("us", "Europe/Berlin"), "1970-01-01T00:00:00.000000+00:00"),
        (2**30, pa.date32(), "2941775-04-07"),
        (86_400_000, pa.date64(), "1970-01-02"),
        (1500, pa.duration("ms"), "PT1.500S"),
        (["a", None], pa.list_(pa.string_view()), ["a", None]),
        ([1, 2], pa.list_(pa.int8(), 2), [1, 2]),
        (None, pa.list_(pa.int8(), 2), None),
    ],
    ids=lambda value: str(value) if isinstance(value, pa.DataType) else "",
)
def test_webdataset_says_a_value_of_any_type_in_json(value, of_type, text):
    rows = drawn(["a dog"], own=pa.array([value], of_type))

    assert [values["own"] for values in said(rows)] == [text]


def test_webdataset_says_values_inside_lists_and_structs_in_json():
    of_type = pa.struct([("at", pa.list_(pa.timestamp("s"))), ("raw", pa.list_(pa.float64()))])
    value = {"at": [NOON.replace(microsecond=0), None], "raw": [1.5, math.nan]}
    rows = drawn(["a dog"], own=pa.array([value], of_type))

    assert said(rows)[0]["own"] == {"at": ["2024-02-29T12:30:15", None], "raw": [1.5, None]}


def test_webdataset_has_the_same_bytes_when_it_is_written_twice():
    rows = drawn()

    assert write(rows, "jpg") == write(rows, "jpg")


def test_webdataset_has_the_same_bytes_when_the_table_is_in_pieces():
    rows = drawn()
    pieces = pa.concat_tables([rows.slice(0, 1), rows.slice(1)])

    assert write(pieces, "jpg") == write(rows, "jpg")


@pytest.mark.parametrize("image_format", ["jpg", "png", "webp"])
def test_webdataset_gives_its_rows_back_when_it_is_read(image_format):
    rows = drawn([f"dog {at}" for at in range(130)], image_format=image_format)
    data = write(rows, image_format)

    assert list(webdataset.read(io.BytesIO(data))) == rows.to_pylist()


def test_webdataset_gives_all_columns_when_some_are_asked_for():
    """A tar is read from its beginning: there is nothing to save."""
    rows = drawn()
    file = io.BytesIO(write(rows, "jpg"))

    assert list(formats.read_shard(file, "data/000000.tar", ["key"])) == rows.to_pylist()


def test_webdataset_is_read_without_seeking():
    """A shard on an object store is read as a stream, from its beginning."""

    class Stream(io.BytesIO):
        def seek(self, *_):
            raise io.UnsupportedOperation("seek")

    rows = drawn()

    assert list(webdataset.read(Stream(write(rows, "jpg")))) == rows.to_pylist()


def test_webdataset_has_keys_without_a_dot_when_the_numbers_are_large():
    key = schema.key(1_234_567, 1_000_000)

    assert "." not in key
    assert key == "1234567-1000000"

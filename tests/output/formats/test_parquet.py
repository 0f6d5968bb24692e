"""A shard as Parquet: what reads it, how it is cut, what its bytes depend on."""

import datetime
import io
import itertools
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sdbatch import schema
from sdbatch.batch.blocks import pack, unpack
from sdbatch.job import Output
from sdbatch.output import image_file
from sdbatch.output.formats import parquet
from tests.finished import drawn

NOON = datetime.datetime(2024, 2, 29, 12, 30, 15, 123456)
EXTRAS = {
    "tags": pa.array([["a", "b"], [], None]),
    "box": pa.array([{"x": 1, "y": 2.5}, None, {"x": None, "y": 0.0}]),
    "taken": pa.array([NOON, None, NOON], pa.timestamp("us")),
    "breed": pa.array(["pug", "pug", None]).dictionary_encode(),
    "story": pa.array(["long", None, "緑"], pa.large_string()),
}


def write(rows):
    return parquet.write(rows, Output(path="unused"))


def opened(data):
    return pq.ParquetFile(pa.BufferReader(data))


def with_images(sizes):
    """Return a shard whose images are of `sizes` bytes."""
    rows = drawn([f"dog {at}" for at in range(len(sizes))])
    images = [{"bytes": bytes([at]) * size, "path": "x"} for at, size in enumerate(sizes)]
    at = rows.schema.get_field_index("image")
    return rows.set_column(at, schema.IMAGE, pa.array(images, schema.IMAGE.type))


def groups(data):
    file = opened(data)
    return [file.read_row_group(at) for at in range(file.num_row_groups)]


@pytest.fixture
def shard(tmp_path):
    """A shard file with extras, as (its table, its path)."""
    rows = drawn(**EXTRAS)
    path = tmp_path / "data" / "000000.parquet"
    path.parent.mkdir()
    path.write_bytes(write(rows))
    return rows, path


def test_parquet_holds_the_table_unchanged_when_pyarrow_opens_it(shard):
    rows, path = shard

    assert pq.read_table(path).equals(rows)
    assert pq.read_schema(path).remove_metadata() == rows.schema
    assert rows.schema == schema.images(schema.extras_of(rows.schema))


def test_parquet_opens_with_pandas(shard):
    import pandas

    rows, path = shard
    frame = pandas.read_parquet(path)

    assert list(frame.columns) == rows.column_names
    assert frame["prompt"].tolist() == rows["prompt"].to_pylist()
    assert frame["image"][0] == rows["image"][0].as_py()
    assert frame["taken"][0].to_pydatetime() == NOON
    assert frame["tags"][0].tolist() == ["a", "b"]


def test_parquet_opens_with_duckdb(shard):
    import duckdb

    rows, path = shard
    columns = ", ".join(["key", "seed", *EXTRAS])
    found = duckdb.execute(f"select {columns}, image.bytes from '{path}' order by key").fetchall()

    lists = [[row[name] for name in columns.split(", ")] for row in rows.to_pylist()]
    assert [list(row[:-1]) for row in found] == lists
    assert [row[-1] for row in found] == [row["bytes"] for row in rows["image"].to_pylist()]


def test_parquet_opens_with_polars(shard):
    import polars

    rows, path = shard
    frame = polars.read_parquet(path)

    assert frame.columns == rows.column_names
    for name in ("key", "image", "prompt", "guidance_scale", "sha256", *EXTRAS):
        assert frame[name].to_list() == rows[name].to_pylist(), name


def test_parquet_opens_with_datasets_and_the_image_is_a_picture(shard, tmp_path):
    import datasets
    from PIL import Image

    rows, path = shard
    found = datasets.load_dataset(
        "parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache")
    )

    assert found.column_names == rows.column_names
    assert isinstance(found.features["image"], datasets.Image)
    assert isinstance(found[0]["image"], Image.Image)
    assert found[0]["image"].size == (rows["width"][0].as_py(), rows["height"][0].as_py())
    for name in ("key", "prompt", "seed", "nsfw", "sha256", *EXTRAS):
        assert list(found[name]) == rows[name].to_pylist(), name


def test_parquet_holds_a_picture_that_says_what_its_row_says(shard):
    for row in pq.read_table(shard[1]).to_pylist():
        said = image_file.read_parameters(row["image"]["bytes"])
        shared = [name for name in said if name in row]

        assert {name: said[name] for name in shared} == {name: row[name] for name in shared}
        pictures = len(schema.INPUT_HASHES)  # which this image was not drawn from
        assert len(shared) == len(schema.SAMPLING) + len(schema.ROW) - pictures


def test_parquet_names_the_image_column_for_hugging_face(shard):
    metadata = pq.read_schema(shard[1]).metadata

    assert json.loads(metadata[b"huggingface"])["info"]["features"]["image"] == {"_type": "Image"}


def test_parquet_has_a_page_index_in_every_column_of_every_row_group(monkeypatch):
    monkeypatch.setattr(parquet, "MOST_ROW_GROUP_BYTES", 100)
    metadata = opened(write(with_images([90, 90]))).metadata

    for group in range(metadata.num_row_groups):
        for column in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(column)
            assert chunk.has_offset_index, chunk.path_in_schema
            assert chunk.has_column_index or not chunk.is_stats_set, chunk.path_in_schema


def test_parquet_compresses_all_but_the_images():
    metadata = opened(write(drawn(**EXTRAS))).metadata.row_group(0)
    codecs = {
        metadata.column(at).path_in_schema: metadata.column(at).compression
        for at in range(metadata.num_columns)
    }

    assert codecs.pop("image.bytes") == "UNCOMPRESSED"
    assert set(codecs.values()) == {"ZSTD"}


@pytest.mark.parametrize(
    ("sizes", "cut"),
    [
        ([40, 40, 250, 40, 70, 30], [2, 1, 1, 2]),  # one image is bigger than a row group may be
        ([250, 40], [1, 1]),
        ([40, 250], [1, 1]),
        ([50, 50, 10], [2, 1]),
        ([100], [1]),
        ([10] * 10, [10]),
        ([10] * 11, [10, 1]),
    ],
)
def test_parquet_starts_a_row_group_where_the_images_would_pass_the_limit(sizes, cut, monkeypatch):
    # What stands beside an image counts too: some 150 bytes a row.
    monkeypatch.setattr(parquet, "MOST_ROW_GROUP_BYTES", 104_000)
    rows = with_images([size * 1000 for size in sizes])
    data = write(rows)

    assert [group.num_rows for group in groups(data)] == cut
    assert pq.read_table(pa.BufferReader(data)).equals(rows)


@pytest.mark.parametrize("seed", range(5))
def test_parquet_keeps_every_row_group_of_more_than_one_image_within_the_limit(seed, monkeypatch):
    monkeypatch.setattr(parquet, "MOST_ROW_GROUP_BYTES", 100_000)
    sizes = np.random.default_rng(seed).integers(0, 150_000, 40).tolist()
    found = [
        [len(row["bytes"]) for row in group["image"].to_pylist()]
        for group in groups(write(with_images(sizes)))
    ]

    assert [size for group in found for size in group] == sizes
    assert all(sum(group) <= 100_000 or len(group) == 1 for group in found)
    beside = 40 * 200  # bytes of other columns, at most: each group is as full as can be
    pairs = itertools.pairwise(found)
    assert all(sum(group) + after[0] + beside > 100_000 for group, after in pairs)


def test_parquet_keeps_row_groups_within_the_limit_when_the_tables_own_columns_are_big(monkeypatch):
    """A table may bring images of its own; the viewer's limit is on all columns together."""
    monkeypatch.setattr(parquet, "MOST_ROW_GROUP_BYTES", 100_000)
    random = np.random.default_rng(0)
    photos = pa.array([random.bytes(30_000) for _ in range(10)])
    metadata = opened(write(drawn([f"dog {at}" for at in range(10)], photo=photos))).metadata

    assert metadata.num_rows == 10
    for at in range(metadata.num_row_groups):
        assert metadata.row_group(at).total_byte_size <= 100_000


def test_parquet_has_the_same_bytes_when_it_is_written_twice():
    rows = drawn(**EXTRAS)

    assert write(rows) == write(rows)


def test_parquet_has_the_same_bytes_when_the_table_came_through_a_block():
    rows = drawn(**EXTRAS)
    travelled = unpack(pack(rows))

    assert write(travelled) == write(rows)


def test_parquet_has_the_same_bytes_when_the_table_is_in_pieces():
    rows = drawn(**EXTRAS)
    pieces = pa.concat_tables([rows.slice(0, 1), rows.slice(1)])

    assert write(pieces) == write(rows)


def test_parquet_has_the_same_bytes_when_each_image_is_a_chunk():
    rows = with_images([2 * 2**20, 5, 3 * 2**20, 7])  # pages are cut at 1 MiB
    at = rows.schema.get_field_index("image")
    chunks = [rows["image"].slice(i, 1).chunk(0) for i in range(4)]
    pieces = rows.set_column(at, schema.IMAGE, pa.chunked_array(chunks))

    assert write(pieces) == write(rows)


def test_parquet_gives_its_rows_back_when_it_is_read(monkeypatch):
    monkeypatch.setattr(parquet, "MOST_ROW_GROUP_BYTES", 2000)  # of images of some 1,000 bytes
    rows = drawn(**EXTRAS)

    assert list(parquet.read(io.BytesIO(write(rows)))) == rows.to_pylist()


class Counting(io.BytesIO):
    """Counts the bytes that are read."""

    count = 0

    def read(self, size=-1):
        data = super().read(size)
        self.count += len(data)
        return data


def test_parquet_reads_no_images_when_only_other_columns_are_asked_for():
    file = Counting(write(with_images([1_000_000] * 3)))
    rows = list(parquet.read(file, ["key", "seed"]))

    assert rows == [{"key": schema.key(0, at), "seed": at} for at in range(3)]
    assert file.count < 200_000


@pytest.mark.parametrize(
    ("asked", "given"),
    [
        (["sha256", "sha256"], ["sha256"]),
        (["seed", "fidelity"], ["seed"]),
        (["tags", "box", "image"], ["image", "tags", "box"]),
    ],
)
def test_parquet_gives_the_columns_that_it_has_of_those_asked_for(asked, given):
    rows = drawn(**EXTRAS)
    found = list(parquet.read(io.BytesIO(write(rows)), asked))

    assert found == rows.select(given).to_pylist()


@pytest.mark.parametrize(
    "column",
    [
        pa.nulls(3),
        pa.array([{"a": None}, {"a": []}, None]),
        pa.array([[{"a": 1}], [], None]),
        pa.array([1, None, 3], pa.duration("s")),
        pa.array(["a", None, "b"], pa.string_view()),
        pa.array([[("a", 1)], [], None], pa.map_(pa.string(), pa.int64())),
        pa.array([2**64 - 1, 0, None], pa.uint64()),
    ],
    ids=lambda column: str(column.type),
)
def test_parquet_keeps_a_column_of_the_tables_own_of_any_type(column):
    rows = drawn(own=column)

    assert pq.read_table(pa.BufferReader(write(rows))).equals(rows)


def test_parquet_keeps_a_column_of_the_tables_own_whose_name_has_a_dot():
    rows = drawn(**{"image.bytes.size": pa.array([1, 2, 3]), "a.b": pa.array(["x", "y", "z"])})

    assert pq.read_table(pa.BufferReader(write(rows))).equals(rows)

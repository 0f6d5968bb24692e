"""The largest sizes of a table's rows: from every format, and what does not count."""

import decimal
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sdbatch.job import Job
from sdbatch.prompts import parquet, requests
from sdbatch.prompts.sizes import Sizes, read_side
from sdbatch.prompts.table import open_table
from sdbatch.schema import Shard

CELLS = [
    *(None, "", 8, 64, 65, 0, -8, 4096, 4104, 512.0, 512.5, float("nan"), float("inf")),
    *("512", " 512 ", "512.0", "1_024", "4104", "-8", "wide", "5" * 50, "9" * 5000),
    *(" " * 50 + "64", True, [64], {"a": 1}, decimal.Decimal("64"), decimal.Decimal("64.5")),
]
ROWS = [  # height and width of rows of one table
    {"height": 64, "width": 128},
    {"height": 2048, "width": 8},
    {"height": 1024, "width": None},
    {"height": None, "width": 2048},
    {"height": 100_000, "width": 4096},
    {"height": None, "width": None},
]
FOUND = {(2048, 8), (1024, None), (None, 2048), (None, None)}


def sizes(job: Job) -> set:
    return set(open_table(job.prompts).sizes)


@pytest.fixture
def sizes_of(write, make_job):
    """Return the sizes of a table that is one file."""

    def opened(name, content, **prompts):
        path = write(name, content)
        return sizes(make_job(prompts={"path": str(path), **prompts}))

    return opened


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: repr(cell)[:20])
def test_a_side_is_read_as_the_row_is_read_later(make_job, cell):
    shard = Shard(0, "a.txt", "", 0, 0, 1)
    job, columns = make_job(), {"prompt": "prompt", "height": "height"}
    rows = pa.table({"prompt": ["a dog"], "height": [cell]})
    (row,) = requests.resolve_requests(rows, shard, job, columns, pa.schema([])).to_pylist()
    if row["error"]:
        with pytest.raises(ValueError, match="not a side"):
            read_side(cell)
    else:
        assert (read_side(cell) or job.sampling.height) == row["height"]


@pytest.mark.parametrize("cell", [2**70, 10**400, "\ud83d"])
def test_a_cell_that_no_column_can_hold_is_no_side(cell):
    with pytest.raises(ValueError, match="not a side"):
        read_side(cell)


def test_the_largest_of_each_choice_of_sides_is_kept():
    found = Sizes()
    for row in ROWS:
        found.add_row(row["height"], row["width"])
    assert set(found) == FOUND


def test_the_largest_image_is_that_of_a_row_or_of_the_job(make_job):
    sampling = make_job(sampling={"height": 512, "width": 256}).sampling
    for found, largest in (
        ([], (512, 256)),
        ([(64, 64)], (512, 256)),
        ([(1024, None)], (1024, 256)),
        ([(None, 1024), (1024, 8)], (512, 1024)),
        ([(None, 1024), (4096, 4096)], (4096, 4096)),
    ):
        assert Sizes(found).largest(sampling) == largest


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv", "rows.jsonl", "rows.json"])
def test_sizes_of_text_tables_are_those_of_the_rows(sizes_of, name):
    rows = [{"prompt": "a dog", **row} for row in ROWS]
    separator = "\t" if name.endswith("tsv") else ","
    lines = [separator.join("" if v is None else str(v) for v in row.values()) for row in rows]
    text = {
        "jsonl": "\n".join(map(json.dumps, rows)),
        "json": json.dumps(rows),
    }.get(name.rpartition(".")[2], "\n".join([separator.join(rows[0]), *lines]))
    assert sizes_of(name, text) == FOUND


def test_sizes_of_rows_in_the_job_are_those_of_the_rows(make_job):
    rows = [{"prompt": "a dog", **row} for row in ROWS]
    assert sizes(make_job(prompts={"path": None, "rows": rows})) == FOUND


def test_sizes_are_read_from_the_columns_that_the_job_names(sizes_of):
    text = "prompt,h,height,width\na dog,64,4096,128\n"
    prompts = {"columns": {"height": "h"}, "keep": []}
    assert sizes_of("a.csv", text, **prompts) == {(64, 128)}
    assert sizes_of("b.txt", "a dog\n") == {(None, None)}


def test_sizes_in_the_names_of_folders_count(write, make_job, tmp_path):
    write("t/height=1024/a.csv", "prompt,width\na dog,64\nb,\n")
    write("t/height=64/b.csv", "prompt,width\nc,128\n")
    write("t/height=tall/c.csv", "prompt,width\nd,4096\n")
    assert sizes(make_job(prompts={"path": str(tmp_path / "t")})) == {(1024, 64), (1024, None)}


KINDS = [pa.int64(), pa.uint16(), pa.int32(), pa.float32(), pa.float64()]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_sizes_of_parquet_are_in_its_footer(tmp_path, make_job, kind):
    rows = [(64, 2048), (1024, 8), (1024, 1024), (None, 512), (8, 8)]
    columns = [pa.array(side, kind) for side in zip(*rows, strict=True)]
    path = tmp_path / "a.parquet"
    whole = pa.table([["a dog"] * 5, *columns], ["prompt", "height", "width"])
    pq.write_table(whole, path, row_group_size=2)
    footer = pq.read_metadata(path).serialized_size + 8
    data = path.read_bytes()
    path.write_bytes(data[:4] + b"\xff" * (len(data) - footer - 4) + data[-footer:])
    # the most of each group of two rows: its highest with its widest
    assert sizes(make_job(prompts={"path": str(path)})) == {(1024, 2048), (None, 1024)}


def test_sizes_of_parquet_are_read_where_its_footer_does_not_say_them(sizes_of, tmp_path):
    rows = [(64, 128), (1024, 8), (None, 512), (100_000, 8), (8, 8)]
    heights, widths = zip(*rows, strict=True)
    found = {(64, 128), (None, 512)}  # 64 x 128 as well as 1024 x 8 pixels
    texts = [None if value is None else str(value) for value in heights]
    columns = {
        "large": pa.array(heights, pa.int64()),
        "text": pa.array(texts),
        "decimal": pa.array([value and decimal.Decimal(value) for value in heights]),
        "dictionary": pa.array(texts).dictionary_encode(),
    }
    for name, column in columns.items():
        content = pa.table([["a dog"] * 5, column, widths], ["prompt", "height", "width"])
        assert sizes_of(f"{name}.parquet", content) == found, name
    path = tmp_path / "none.parquet"
    pq.write_table(content.slice(0, 3), path, write_statistics=False)
    assert set(parquet.inspect_file(str(path), ("height", "width")).sizes) == found


@pytest.mark.parametrize(
    "column",
    [
        pa.array([None, None], pa.int32()),
        pa.nulls(2),
        pa.array([[64], [128]]),
        pa.array([{"height": 4096}, None]),
        pa.array([True, False]),
    ],
    ids=str,
)
def test_parquet_columns_that_set_no_size_are_no_error_of_the_footer(tmp_path, column):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"height": column}), path)
    found = set(parquet.inspect_file(str(path), ("height", "width")).sizes)
    assert found in (set(), {(None, None)})

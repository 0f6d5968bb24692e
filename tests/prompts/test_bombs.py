"""Tables that a few bytes make very large: refused in one line, or read within bounds."""

import gzip
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sdbatch.errors import PromptTableError
from sdbatch.job import Reader
from sdbatch.prompts import file_info, files, parquet
from sdbatch.prompts.rows import MOST_COLUMNS
from sdbatch.prompts.text import MOST_JSON
from tests.prompts.test_table import open_path, rows

LONG = b"x" * (file_info.MOST_ROW + 1)
pytestmark = pytest.mark.timeout(60)  # what a bomb expands to would take hours, if memory held it


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("a.txt.gz", b"a dog\n" + LONG, 2),
        ("a.csv.gz", b"prompt\na dog\n" + LONG, 3),
        ("a.tsv.gz", b"prompt\na dog\n\n" + LONG, 4),
        ("a.jsonl.gz", b'{"prompt": "a dog"}\n{"prompt": "' + LONG, 2),
    ],
)
def test_text_row_that_is_too_long_is_an_error_with_its_line(write, name, content, line):
    path = write(name, gzip.compress(content, 1))
    with pytest.raises(PromptTableError, match=rf"{name} line {line} = more than 64 MiB: a row"):
        open_path(path)


def test_json_file_that_is_too_large_is_an_error(write):
    path = write("a.json.gz", gzip.compress(b" " * (MOST_JSON + 1), 1))
    with pytest.raises(PromptTableError, match=r"more than 256 MiB of JSON.*Use JSONL"):
        open_path(path)


def test_bytes_that_are_not_utf8_after_a_long_line_are_an_error_with_their_line(write):
    path = write("a.txt.gz", gzip.compress("ü\n".encode() * 700_000 + b"\xff" + LONG, 1))
    with pytest.raises(PromptTableError, match=r"line 700001 = bytes that are not UTF-8"):
        open_path(path)
    path = write("b.txt", b"a\nb\xc3")
    with pytest.raises(PromptTableError, match=r"line 2 = bytes that are not UTF-8"):
        open_path(path)


def test_csv_field_that_is_too_long_is_an_error_with_the_way_out(write):
    path = write("a.csv", f"prompt\n{'x' * 200_000}\n")
    with pytest.raises(PromptTableError, match=r"line 2 = .*at most 131,072 char.*Use JSONL"):
        open_path(path)


def test_columns_without_end_are_an_error(write):
    lines = "".join(json.dumps({"prompt": "a", f"k{i}": 1}) + "\n" for i in range(MOST_COLUMNS))
    with pytest.raises(PromptTableError, match=r"more than 2,000 columns: must have fewer"):
        open_path(write("a.jsonl", lines))


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_rows_of_a_shard_that_are_too_large_together_are_an_error(write, monkeypatch, name):
    table = [{"prompt": "x" * 100}] * 20
    if name == "a.jsonl":
        path = write(name, "".join(f"{json.dumps(row)}\n" for row in table))
    else:
        path = write(name, pa.Table.from_pylist(table))
    assert len(rows(path)) == 20
    monkeypatch.setattr(file_info, "MOST_ROWS", 1000)
    with pytest.raises(PromptTableError, match=r"rows 0 to 20 = more.*smaller output.images_per_s"):
        rows(path)


def test_zstd_is_read_within_the_same_bounds(write):
    packed = bytes(pa.Codec("zstd").compress(b"a dog\n" + LONG, asbytes=True))
    with pytest.raises(PromptTableError, match=r"line 2 = more than 64 MiB: a row"):
        open_path(write("a.txt.zst", packed))
    packed = bytes(pa.Codec("zstd").compress(b" " * (MOST_JSON + 1), asbytes=True))
    with pytest.raises(PromptTableError, match=r"more than 256 MiB of JSON.*Use JSONL"):
        open_path(write("a.json.zst", packed))


def arrow(table, **options) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table)
    return sink.getvalue()


@pytest.mark.parametrize("encoded", [False, True])
def test_arrow_batch_that_becomes_too_large_is_an_error_before_it_is_unpacked(write, encoded):
    values = pa.array([" " * 60_000_000] * 9, pa.large_string())
    table = pa.table({"prompt": values.dictionary_encode() if encoded else values})
    if encoded:  # nine different values
        longer = pa.array([" " * (60_000_000 + i) for i in range(9)], pa.large_string())
        table = pa.table({"prompt": longer.dictionary_encode()})
    bomb = arrow(table, compression="zstd")
    assert len(bomb) < 200_000
    with pytest.raises(PromptTableError, match=r"a batch of 515 MiB: must have at most 512 MiB"):
        open_path(write("a.arrow", bomb))


@pytest.mark.parametrize("kind", ["dictionary", "view"])
def test_arrow_value_in_very_many_rows_is_read_for_those_of_the_shard_alone(write, kind):
    long = "x" * 10_000_000
    if kind == "dictionary":
        column = pa.DictionaryArray.from_arrays(pa.array([0] * 10_000, pa.int32()), [long])
    else:
        one = pa.array([long], pa.string_view())
        _, views, *data = one.buffers()
        views = pa.py_buffer(views.to_pybytes()[:16] * 10_000)
        column = pa.Array.from_buffers(pa.string_view(), 10_000, [None, views, *data])
    path = write("a.arrow", arrow(pa.table({"prompt": column})))
    schema = pa.schema([("prompt", pa.large_string())])
    part = files.read_rows(path, Reader(), 50, 52, schema)
    assert part["prompt"].to_pylist() == [long] * 2
    with pytest.raises(PromptTableError, match=r"rows 0 to 1000 = more than 512 MiB"):
        files.read_rows(path, Reader(), 0, 1000, schema)


def test_caption_that_is_too_long_is_an_error_with_its_name(write, tmp_path):
    write("t/a.png", b"\x89PNG")
    write("t/a.txt", LONG)
    with pytest.raises(PromptTableError, match=r"t/a.txt = more than 64 MiB: a row"):
        open_path(tmp_path / "t")


def repeated(value: str, count: int, **options) -> bytes:
    """Return a Parquet file that holds `value` once and its number in every row."""
    column = pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), pa.array([value]))
    sink = io.BytesIO()
    options = {"compression": "zstd", "dictionary_pagesize_limit": 2**30, **options}
    pq.write_table(pa.table({"prompt": column}), sink, store_schema=False, **options)
    return sink.getvalue()


def test_parquet_value_in_very_many_rows_is_read_for_those_of_the_shard_alone(write):
    bomb = repeated("x" * 10_000_000, 100_000)
    assert len(bomb) < 10_000
    path = write("a.parquet", bomb)
    schema = parquet.inspect_file(path, ("height", "width")).schema
    assert parquet.read_rows(path, 50, 52, schema)["prompt"].to_pylist() == ["x" * 10_000_000] * 2
    with pytest.raises(PromptTableError, match=r"rows 0 to 1000 = more than 512 MiB"):
        parquet.read_rows(path, 0, 1000, schema)


def test_parquet_value_that_is_too_long_is_an_error_with_its_row(write):
    prompts = ["a dog"] * 70 + [LONG.decode()]
    path = write("a.parquet", pa.table({"prompt": prompts}))
    with pytest.raises(PromptTableError, match=r"row 70 column 'prompt' = more than 64 MiB"):
        rows(path)
    encoded = pa.table({"prompt": pa.array(prompts).dictionary_encode()})
    with pytest.raises(PromptTableError, match=r"row 70 column 'prompt' = more than 64 MiB"):
        rows(write("b.parquet", encoded))


def test_parquet_rows_that_are_too_long_on_average_are_an_error_before_they_are_read(write):
    numbers = pa.ListArray.from_arrays([0, 9_000_000], pa.nulls(9_000_000, pa.int64()))
    path = write("a.parquet", pa.table({"prompt": ["a"], "x": numbers}))
    with pytest.raises(PromptTableError, match=r"row group 0 column 'x.list.element' = more than"):
        rows(path)


@pytest.mark.parametrize("encoding", ["PLAIN", "DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY"])
@pytest.mark.parametrize("page", ["1.0", "2.0"])
def test_every_encoding_of_text_is_read(write, encoding, page):
    table = pa.table({"prompt": [f"dog {i}" for i in range(50)] + [None, "", "é"]})
    sink = io.BytesIO()
    options = {"column_encoding": {"prompt": encoding}, "data_page_version": page}
    pq.write_table(table, sink, use_dictionary=False, row_group_size=20, **options)
    assert rows(write("a.parquet", sink.getvalue())) == table.to_pylist()


def test_dictionary_has_the_size_that_its_page_says(write):
    path = write("a.parquet", repeated("x" * 1_000_000, 3))
    with open(path, "rb") as file:
        chunk = pq.read_metadata(file).row_group(0).column(0)
        assert parquet._dictionary_bytes(file, chunk) == 1_000_004  # with the length in 4 bytes

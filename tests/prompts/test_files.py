"""Files that are not a prompt table, or that changed after they were inspected."""

import gzip
import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sdbatch.errors import PromptTableError
from sdbatch.job import Reader
from sdbatch.prompts import files
from tests.prompts.test_table import rows


def broken_page():
    pq.write_table(pa.table({"prompt": ["a dog"]}), sink := io.BytesIO())
    return sink.getvalue()[:20] + b"\xff" * 20 + sink.getvalue()[40:]


BROKEN = {
    "empty.txt": ("", "^prompts.path = .*holds no row"),
    "empty.csv": ("prompt\n", "^prompts.path = .*holds no row"),
    "empty.parquet": (pa.table({"prompt": []}), "^prompts.path = .*holds no row"),
    "text.parquet": ("a dog", "must be a Parquet file"),
    "footer.parquet": (b"PAR1" + b"\xff" * 9 + b"\x09\0\0\0PAR1", "must be a Parquet file"),
    "page.parquet": (broken_page(), "must be a Parquet file"),
    "twice.parquet": (pa.table([["a"], ["b"]], names=["prompt", "prompt"]), "appears twice"),
    "twice.csv": ("prompt,n,n\na,1,2\n", "column 'n' appears twice: rename one"),
    "plain.csv.gz": ("prompt\na\n", "gzip"),
    "cut.csv.gz": (gzip.compress(b"prompt\na dog\n")[:-9], "must be a complete file"),
    "noise.csv.xz": ("prompt\na\n", "noise.csv.xz = .*must be"),
    "ragged.csv": ('prompt,n\n"a\nb",1\nc,d,2\n', "line 4 = 3 fields: must be 2, as in the head"),
    "quote.csv": ('prompt\na\n"b" c\n', "line 3 = .*must be valid CSV"),
    "cut.json": ('["a",\n', "line 2 column 1.*must be valid JSON"),
    "deep.json": ("[" * 100_000, "must be valid JSON"),
    "number.json": ("3", "= 3: must be a list of objects or of strings"),
    "cut.jsonl": ('{"prompt":\n', "cut.jsonl line 1 = .*must be JSON"),
    "array.jsonl": ('[["b"]]\n', r"line 1 = \[\['b'\]\]: must be an object or a string"),
    "half.jsonl": (
        '{"prompt": "\\ud83d"}\n',
        "half.jsonl line 1 column 'prompt' = half a surrogate pair",
    ),
    "nothing.jsonl": ("{}\n", "no column 'prompt'"),
    "latin.csv": (
        b"prompt\ncaf\xe9\n",
        "latin.csv line 2 = bytes that are not UTF-8: save the file as UTF-8",
    ),
    "late.txt": (b"a\n" * 50_000 + b"\xff\n", "late.txt line 50001 = bytes that are not UTF-8"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_file_that_is_not_a_table_is_rejected_with_place_and_reason(write, name):
    content, words = BROKEN[name]
    with pytest.raises(PromptTableError, match=words) as caught:
        rows(write(name, content))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("stop", [6, 20])
@pytest.mark.parametrize("name", ["a.parquet", "a.txt"])
def test_file_that_lost_rows_after_inspection_is_rejected(write, name, stop):
    path = write(name, pa.table({"prompt": ["a"] * 5}) if name == "a.parquet" else "a\n" * 5)
    with pytest.raises(
        PromptTableError, match=rf"{name} = ends before row {stop}: must have its rows"
    ):
        files.read_rows(path, Reader(), stop - 2, stop, pa.schema([("prompt", pa.string())]))

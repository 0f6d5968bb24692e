"""Any prompt table: its files, its columns, rows in the job file, and errors about columns."""

import bz2
import gzip
import json
import lzma
import uuid

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sdbatch.errors import JobError, PromptTableError
from sdbatch.job import Prompts, parse
from sdbatch.output import identity, plan
from sdbatch.prompts import table
from sdbatch.prompts.rows import BATCH_ROWS
from sdbatch.prompts.table import open_table, read_rows
from sdbatch.storage import Store

TWO = [{"prompt": 'a "red" dog, wet', "n": "1"}, {"prompt": "ein großer\nHund", "n": None}]
AB = [{"prompt": "a"}, {"prompt": "b"}]
PAIR = [{"prompt": "a dog"}, {"prompt": 'ein "großer" Hund'}]
CSV = 'prompt,n\n"a ""red"" dog, wet",1\n\n"ein großer\nHund",\n'
# One table in each format: its text and its rows.
FORMATS = {
    "lf.csv": (CSV, TWO),
    "bom.csv": ("\ufeff" + CSV, TWO),
    "crlf.csv": ('prompt\r\na dog\r\n"\r\n"\r\n', [PAIR[0], {"prompt": "\r\n"}]),
    "quotes.tsv": ('prompt\n"a" dog\n\n"\n', [{"prompt": '"a" dog'}, {"prompt": '"'}]),
    "objects.json": (json.dumps(TWO), TWO),
    "strings.json": (json.dumps([row["prompt"] for row in PAIR]), PAIR),
    "blank.ndjson": ("\n".join(["", *map(json.dumps, TWO), "  ", ""]), TWO),
    "strings.jsonl": ('"a dog"\r\n"ein \\"gro\u00dfer\\" Hund"', PAIR),
    "crlf.txt": ('a dog\r\n\r\nein "großer" Hund\r\n', PAIR),
    "UPPER.TXT": ('a dog\nein "großer" Hund', PAIR),
}
KINDS = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
PACK = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def open_path(path, **keys):
    return table.open_table(Prompts(path=path if isinstance(path, list) else str(path), **keys))


def rows(path, **keys):
    """Return all rows of a table, in order."""
    opened = open_path(path, **keys)
    parts = [table.read_rows(source, 0, source.rows, opened.schema) for source in opened.sources]
    return pa.concat_tables(parts).to_pylist()


def names(path):
    return [source.name for source in open_path(path).sources]


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("name", FORMATS)
def test_text_table_gives_its_rows_compressed_or_not(write, name, suffix):
    text, expected = FORMATS[name]
    path = write(name + suffix, PACK[suffix](text.encode()))
    assert rows(path) == expected
    opened = open_path(path)
    assert table.read_rows(opened.sources[0], 1, 2, opened.schema).to_pylist() == expected[1:]


@pytest.mark.parametrize("codec", ["none", "snappy", "gzip", "brotli", "zstd", "lz4"])
@pytest.mark.parametrize("kind", KINDS)
def test_parquet_table_gives_its_rows_with_every_codec_and_text_type(tmp_path, codec, kind):
    prompts = pa.array([row["prompt"] for row in PAIR]).cast(kind)
    pq.write_table(pa.table({"prompt": prompts}), tmp_path / "a.pq", compression=codec)
    assert rows(tmp_path / "a.pq") == PAIR


def test_every_column_of_csv_is_text_and_of_json_has_its_type(write):
    csv = open_path(write("a.csv", "prompt,seed,tag\na,1,2\n")).schema
    assert {field.type for field in csv} == {pa.string()}
    mixed = '{"prompt":"a","seed":1,"x":[1.5]}\n{"prompt":"b","x":null,"y":{"z":true}}'
    types = open_path(write("a.jsonl", mixed)).schema.field
    assert (types("seed").type, types("x").type) == (pa.int64(), pa.list_(pa.float64()))
    assert types("y").type == pa.struct([("z", pa.bool_())])


@pytest.mark.parametrize("first", [1, "s"])
def test_json_column_of_mixed_types_is_stored_as_json_text_wherever_they_mix(write, first):
    values = [first] * BATCH_ROWS + [
        "ä",
        {"k": [1]},
        None,
        2**80,
    ]  # the first batch has one type
    lines = "\n".join(json.dumps({"prompt": "a", "x": value}) for value in values)
    values = [row["x"] for row in rows(write("a.jsonl", lines))]
    assert values == [json.dumps(first)] * BATCH_ROWS + ['"ä"', '{"k": [1]}', None, str(2**80)]


def test_json_column_of_numbers_and_then_lists_is_json_text(write):
    values = [1] * BATCH_ROWS + [["one"]] * 3
    lines = "\n".join(json.dumps({"prompt": "a", "x": value}) for value in values)
    values = [row["x"] for row in rows(write("a.jsonl", lines))]
    assert values == ["1"] * BATCH_ROWS + ['["one"]'] * 3


def test_json_column_of_numbers_and_then_text_is_text(write):
    values = [1, 0.5] * BATCH_ROWS + ["one", True] * 3
    lines = "\n".join(json.dumps({"prompt": "a", "x": value}) for value in values)
    values = [row["x"] for row in rows(write("a.jsonl", lines))]
    assert values == ["1", "0.5"] * BATCH_ROWS + ["one", "true"] * 3


@pytest.mark.parametrize("group", [1_000_000, 9_999])
def test_any_range_of_a_million_rows_is_read_exactly(tmp_path, group):
    prompts = pa.array(np.arange(1_000_000)).cast(pa.string())
    pq.write_table(pa.table({"prompt": prompts}), tmp_path / "a.parquet", row_group_size=group)
    opened = open_path(tmp_path / "a.parquet")
    for start, stop in ((0, 1), (503_999, 515_001), (999_990, 1_000_000)):
        part = table.read_rows(opened.sources[0], start, stop, opened.schema)
        assert part["prompt"].combine_chunks().equals(prompts[start:stop])


def test_two_thousand_files_are_one_table(write, tmp_path):
    for i in range(2000):
        write(f"{i:04d}.txt", f"dog {i}\n")
    assert rows(tmp_path) == [{"prompt": f"dog {i}"} for i in range(2000)]


def test_file_folder_glob_and_list_find_the_same_rows_in_name_order(write, tmp_path):
    b, a = write("t/b.txt", "b\n"), write("t/a.txt", "a\n")
    assert rows(tmp_path / "t") == rows(tmp_path / "t" / "*.txt") == rows(f"{tmp_path}/?/*") == AB
    assert rows([a, b]) == rows(f"file://{tmp_path}/t/") == AB
    assert rows([b, a]) == AB[::-1]  # a list keeps its own order
    assert (rows(a), names(a)) == (AB[:1], ["a.txt"])
    assert rows([a, write("u/a.txt", "b\n")]) == AB  # two files with the same name


def test_source_names_are_relative_to_the_path(write, tmp_path):
    write("t/x/a.txt", "a\n")
    write("t/b.txt", "b\n")
    assert names(tmp_path / "t") == names(f"file://{tmp_path}/t") == ["b.txt", "x/a.txt"]
    assert names(f"{tmp_path}/*/*.txt") == ["t/b.txt"]


def test_hidden_files_and_other_formats_in_a_folder_are_ignored(write, tmp_path):
    write("t/a.txt", "a\n")
    for name in ("_SUCCESS", ".a.txt.crc", ".b.txt", "_tmp/0.txt", ".git/x.csv", "README.md"):
        write(f"t/{name}", "no prompt\n")
    assert names(tmp_path / "t") == ["a.txt"]


def test_folders_of_a_hive_table_become_text_columns(write, tmp_path):
    write("t/lang=de/_year=2024/a.csv", "prompt\nHund\nKatze\n")
    write("t/lang=en/b.csv", "prompt\ndog\n")
    write("t/c.csv", "prompt\nchien\n")
    german = [("Hund", "de", "2024"), ("Katze", "de", "2024")]
    values = [tuple(row.values()) for row in rows(tmp_path / "t")]
    assert values == [("chien", None, None), *german, ("dog", "en", None)]


def test_column_of_a_file_wins_over_its_hive_folder_for_any_row_range(write, tmp_path):
    write("t/lang=de/a.parquet", pa.table({"prompt": ["a", "b"], "lang": ["nl", None]}))
    opened = open_path(tmp_path / "t")
    parts = [table.read_rows(opened.sources[0], i, i + 1, opened.schema) for i in range(2)]
    assert pa.concat_tables(parts)["lang"].to_pylist() == ["nl", None]


def test_table_on_a_remote_store_reads_like_a_local_one():
    store = Store(f"memory://{uuid.uuid4().hex}")
    store.put("t/a.csv", b"prompt\na\n")
    store.put("t/b.csv.gz", gzip.compress(b"prompt\nb\n"))
    assert rows(f"{store.url}/t") == rows(f"{store.url}/t/*.csv*") == AB
    assert names(f"{store.url}/t") == ["a.csv", "b.csv.gz"]
    fsspec.filesystem("memory").rm(store.url, recursive=True)


def test_columns_of_several_files_are_united_where_their_types_allow_it(write, tmp_path):
    write("t/a.parquet", pa.table({"prompt": ["a"], "n": pa.array([1], pa.int32())}))
    write("t/b.parquet", pa.table({"m": [0.5], "prompt": pa.array(["b"], pa.large_string())}))
    write("t/c.parquet", pa.table({"prompt": ["c"], "n": pa.array([2**40]), "m": pa.nulls(1)}))
    values = [tuple(row.values()) for row in rows(tmp_path / "t")]
    assert values == [("a", 1, None), ("b", None, 0.5), ("c", 2**40, None)]


def test_file_without_any_used_column_gives_rows_of_nulls(write, tmp_path):
    write("t/a.parquet", pa.table({"prompt": ["a"]}))
    write("t/b.parquet", pa.table({"caption": ["b", "c"]}))
    assert rows(tmp_path / "t", keep=[]) == [{"prompt": "a"}, {"prompt": None}, {"prompt": None}]


@pytest.mark.parametrize("mixed", ["a", "b"])
def test_column_that_mixes_types_in_one_file_is_json_text_in_all(write, tmp_path, mixed):
    for name in ("a", "b"):
        more = '{"prompt":"p","x":[1]}' if name == mixed else ""
        write(f"t/{name}.jsonl", '{"prompt":"p","x":"t"}\n' + more)
    assert sorted(row["x"] for row in rows(tmp_path / "t")) == ['"t"', '"t"', "[1]"]


@pytest.mark.parametrize(
    ("name", "a", "b", "file"),
    [("n", b"1", 1, "b"), ("n", [1], 1, "b"), ("seed", 2**60 + 1, 0.5, "a")],
)
def test_columns_of_incompatible_types_in_two_files_are_rejected(write, tmp_path, name, a, b, file):
    write("t/a.parquet", pa.table({"prompt": ["a"], name: [a]}))
    write("t/b.parquet", pa.table({"prompt": ["b"], name: [b]}))
    with pytest.raises(
        PromptTableError,
        match=rf"t/{file}\.parquet.* = .*{name}|t/{file}\.parquet column .{name}. = ",
    ):
        rows(tmp_path / "t")


def test_unused_columns_become_extras_unless_keep_lists_others(write):
    path = write("a.parquet", pa.table({"i": [7], "caption": ["a"], "y": [2], "x": [1]}))
    columns = {"id": "i", "prompt": "caption"}
    assert open_path(path, columns=columns).extras.names == ["i", "y", "x"]
    assert open_path(path, columns=columns, keep=["x", "caption"]).extras.names == ["x", "caption"]
    assert open_path(path, columns=columns, keep=[]).extras.names == []
    path = write("b.parquet", pa.table({"prompt": ["a"], "key": [1], "n": [2]}))
    assert open_path(path, keep=["n"]).extras.names == [
        "n"
    ]  # resolves the name conflict that is rejected below


@pytest.mark.parametrize(
    ("row", "keys", "words"),
    [
        ({"caption": "a", "n": 1}, {}, r"no column 'prompt'.*: caption, n\. .*prompt=caption$"),
        ({}, {"columns": {"seed": "s"}}, r"^prompts\.columns\.seed = 's': not in .* has: prompt"),
        (
            {"n": 1},
            {"keep": ["m"]},
            r"^prompts\.keep = 'm': must be in the table, once\. It has: prompt, n",
        ),
        ({"n": 1}, {"keep": ["n", "n"]}, r"^prompts\.keep"),
        ({"key": 1, "n": 1}, {}, r"column 'key' .*rename it, or .*--set 'prompts\.keep=\[n\]'"),
        ({"c": "a"}, {"columns": {"prompt": "c"}}, r"column 'prompt' .*'prompts\.keep=\[\]'"),
        ({"prompt": 1}, {}, r"'prompt' = int64: must hold text to be used as prompt"),
        ({"sampler": True}, {}, r"'sampler' = bool: must hold text to be used as sampler"),
        ({"seed": True}, {}, r"'seed' = bool: must hold numbers to be used as seed"),
        ({"width": [8]}, {}, r"'width' = list<.*: must hold numbers to be used as width"),
        ({"n": [8]}, {"columns": {"id": "n"}}, r"'n' = list<.*: must hold text or numbers"),
    ],
)
def test_unusable_columns_are_rejected_with_the_way_out(write, row, keys, words):
    base = {} if "caption" in row else AB[0]
    path = write("a.parquet", pa.Table.from_pylist([{**base, **row}]))
    with pytest.raises(PromptTableError, match=words):
        open_path(path, **keys)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("nope.csv", r"^prompts\.path = .*nope\.csv: no such file"),
        ("t", r"^prompts\.path = .*/t: no such file, or no table in the folder"),
        ("t/a.doc", r"a\.doc = text without a known suffix: must be one of parquet, .*format=txt"),
        ([], r"^prompts\.path = \[\]: must name at least one file"),
    ],
)
def test_path_without_a_table_is_rejected_with_the_path(write, tmp_path, path, words):
    write("t/a.doc", "a\n")
    with pytest.raises(PromptTableError, match=words):
        open_path(tmp_path / path if path else path)


JOB = {"model": "builtin:shapes", "output": {"path": "out"}}
ROWS = [
    {"prompt": 'a red dog: "big"\nand ü', "seed": 2**53 + 1, "tags": ["a"], "guidance_scale": 3},
    {"prompt": "", "tags": None},
]


def job_of(**prompts):
    return parse({**JOB, "prompts": prompts})


def test_inline_rows_are_read_like_those_of_a_file():
    job = job_of(rows=ROWS, images_per_row=2)
    table = open_table(job.prompts)
    planned = plan.make_plan(job, table, None)
    assert (table.rows, planned.shards[0].images) == (2, 4)
    [source] = table.sources
    rows = read_rows(source, 0, 2, table.schema, job.prompts.rows).to_pylist()
    assert rows[0] == {
        "prompt": 'a red dog: "big"\nand ü',
        "seed": 2**53 + 1,
        "guidance_scale": 3,
        "tags": ["a"],
    }
    assert rows[1] == {"prompt": "", "seed": None, "guidance_scale": None, "tags": None}


def test_inline_rows_are_in_no_url_and_no_shard():
    """A copy in each shard of the plan would take rows times shards of memory."""
    job = job_of(rows=[{"prompt": f"dog {i}"} for i in range(500)])
    job = job.updated(output=job.output.updated(images_per_shard=1))
    planned = plan.make_plan(job, open_table(job.prompts), None)
    assert len(planned.shards) == 500
    assert planned.urls() == {"rows.jsonl": "prompts.rows"}


def test_columns_are_mapped_and_selected_like_those_of_a_file():
    rows = [{"caption": "a dog", "licence": "CC0", "id": 7, "x": 1}]
    table = open_table(
        job_of(rows=rows, columns={"prompt": "caption", "id": "id"}, keep=["licence"]).prompts
    )
    assert table.extras.names == ["licence"]
    with pytest.raises(PromptTableError, match=r"no column 'prompt'\. It has: caption, licence"):
        open_table(job_of(rows=rows).prompts)


def test_other_inline_rows_change_the_fingerprint():
    libraries = identity.versions()
    one, other = (job_of(rows=[{"prompt": prompt}]) for prompt in ("a dog", "a cat"))
    assert identity.fingerprint(one, libraries) != identity.fingerprint(other, libraries)


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ({}, "prompts.path = nothing: must be given, or rows instead"),
        (
            {"path": "a.csv", "rows": ROWS},
            "prompts.rows = given together with path: a job has one table",
        ),
        ({"rows": []}, r"prompts.rows = \[\]: must be not empty"),
        ({"rows": ["a dog"]}, "prompts.rows.0 = 'a dog': must be a section of keys"),
        ({"rows": {"prompt": "a dog"}}, "prompts.rows = .*: must be a list"),
        (
            {"rows": [*ROWS, {"prompt": "a dog", "image": b"\x89PNG"}]},
            rf"prompts.rows.{len(ROWS)}.image = b'.x89PNG': must be text.*the path, the URL or a",
        ),
        (
            {"rows": [{"prompt": "a", "x": [{"y": Image.new("L", (8, 8))}]}]},
            r"prompts.rows.0.x = <PIL.*: must be",
        ),
    ],
)
def test_invalid_prompts_sections_are_rejected(prompts, words):
    with pytest.raises(JobError, match=words):
        job_of(**prompts)


def test_a_prompt_that_is_not_text_is_rejected():
    with pytest.raises(PromptTableError, match="column 'prompt' = int64: must hold text"):
        open_table(job_of(rows=[{"prompt": 3}]).prompts)

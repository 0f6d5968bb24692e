"""Tables as people have them, each written here: the rows that must come out, or the error's words.

A value of `Fault` is a row that stays and fails with these words.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import re

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from sdbatch.errors import PromptTableError
from sdbatch.job import parse
from sdbatch.prompts import table

JOB = {"model": "builtin:shapes", "output": {"path": "out"}}
PAIR = [{"prompt": "a dog, wet"}, {"prompt": "a cat"}]
SEEDS = [{"prompt": "a dog, wet", "seed": 5}, {"prompt": "a cat", "seed": 6}]
TEXTS = [{**row, "seed": str(row["seed"])} for row in SEEDS]  # as CSV has them
FRAME = pd.DataFrame(SEEDS)
PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
HTML = "<!DOCTYPE html>\n<html><body>Not found</body></html>\n"


class Fault(str):
    """The words of a row that cannot be read or drawn."""


def ipc(rows, stream=False, **options):
    sink = io.BytesIO()
    data = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows)
    options = pa.ipc.IpcWriteOptions(**options)
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(
        sink, data.schema, options=options
    ) as w:
        w.write_table(data, max_chunksize=1)
    return sink.getvalue()


def parquet(rows, **options):
    sink = io.BytesIO()
    data = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows)
    pq.write_table(data, sink, **options)
    return sink.getvalue()


def feather(**options):
    pyarrow.feather.write_feather(pa.Table.from_pylist(SEEDS), sink := io.BytesIO(), **options)
    return sink.getvalue()


def saved(rows, **splits):
    """Return a function that saves a Hugging Face dataset, or a dictionary of splits."""

    def save(folder):
        of = datasets.Dataset.from_list
        whole = datasets.DatasetDict({name: of(each) for name, each in splits.items()})
        (whole if splits else of(rows)).save_to_disk(folder)

    return save


def open_job(files, path, tmp_path, prompts):
    for name, content in files.items():
        file = tmp_path / "t" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if callable(content):
            content(file)
        else:
            file.write_bytes(content.encode() if isinstance(content, str) else content)
    job = parse({**JOB, "prompts": {"path": str(tmp_path / "t" / path), **prompts}})
    return job, table.open_table(job.prompts)


def read_all(job, opened):
    """Return the rows that the table holds; in place of one that cannot be read, its fault."""
    rows = []
    for source in opened.sources:
        part = table.read_rows(source, 0, source.rows, opened.schema, None, job.prompts.reader)
        for row in part.to_pylist():
            fault = row.pop("sdbatch: fault", None)
            rows.append(fault or row)
    return rows


def z(text):
    return bytes(pa.Codec("zstd").compress(text.encode(), asbytes=True))


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def tsv(rows, quoting):
    csv.writer(out := io.StringIO(), delimiter="\t", quoting=quoting).writerows(rows)
    return out.getvalue()


SEMI = "prompt;seed\na dog, wet;5\na cat;6\n"
COCO = {
    "info": {"year": 2014},
    "images": [{"id": 9, "file_name": "9.jpg"}],
    "licenses": [{"id": 1, "name": "CC"}],
    "annotations": [{"image_id": 9, "id": 1, "caption": "a dog"}],
}
CAPTION = [{"image_id": 9, "id": 1, "caption": "a dog"}]
BY_CAPTION = {"columns": {"prompt": "caption"}}
TSV_QUOTED = [["prompt", "note"], ['a "red" dog', "x"], ["two\nlines", "y"], ["a cat", "z"]]
QUOTED_ROWS = [dict(zip(TSV_QUOTED[0], row, strict=True)) for row in TSV_QUOTED[1:]]
BROKEN_LINE = lines("a dog") + '{"prompt": \n' + lines("a cat")
BAD = Fault("line 2 = .*: must be JSON")
A1111 = (
    '--prompt "a dog, \\"wet\\"" --negative_prompt "blurry" --seed 5 --steps 20 --cfg_scale 7\n'
    "--prompt a cat on a mat --width 64 --height 72 --sampler_name ddim --seed -1\n\na plain line\n"
)
A1111_ROWS = [
    {"prompt": 'a dog, "wet"', "negative_prompt": "blurry", "seed": "5"},
    {"prompt": "a cat on a mat", "width": "64", "height": "72", "sampler": "ddim"},
    {"prompt": "a plain line"},
]
A1111_ROWS[0] |= {"num_inference_steps": "20", "guidance_scale": "7"}
NOT_UTF8 = pa.Array.from_buffers(
    pa.string(), 2, [None, pa.array([0, 1, 3], pa.int32()).buffers()[1], pa.py_buffer(b"a\xff\xfe")]
)
STYLES = "name,prompt,negative_prompt\nfilm,{prompt} on film,blurry\nplain,a cat,\n"
CARD = {"1.png": PNG, "1.txt": "a dog, wet\n", "2.jpg": b"\xff\xd8\xff", "2.txt": "a cat"}
CAPTIONS = [{"id": "1", "prompt": "a dog, wet"}, {"id": "2", "prompt": "a cat"}]
DICTIONARY = pa.table({"prompt": pa.array(["a cat"]).dictionary_encode(), "x": [2]})
COLUMNS = FRAME.to_json()  # pandas' default, orient="columns"
KEYED = {f"id{i}": {"prompt": "p"} for i in range(10_000)}

# name: the files (one: the path is the file; else the folder), the job's prompts, what comes out.
ROWS = {
    # separators, headers, quotes
    "semicolons": ({"a.csv": SEMI}, {}, TEXTS),
    "bars": ({"a.csv": SEMI.replace(";", "|")}, {}, TEXTS),
    "tabs in csv": ({"a.csv": SEMI.replace(";", "\t")}, {}, TEXTS),
    "commas in tsv": ({"a.tsv": 'prompt,seed\n"a dog, wet",5\na cat,6\n'}, {}, TEXTS),
    "excel's sep line": ({"a.csv": "sep=;\r\n" + SEMI.replace("\n", "\r\n")}, {}, TEXTS),
    "one column": ({"a.csv": "prompt\na dog, wet\na cat\n"}, {}, PAIR),
    "one quoted column": ({"a.csv": 'prompt\n"a dog, wet"\na cat\n'}, {}, PAIR),
    "excel's empty rows": (
        {"a.csv": 'prompt,seed,\n"a dog, wet",5,\na cat,6,\n,,\n,,\n'},
        {},
        TEXTS,
    ),
    "named separator": ({"a.csv": SEMI.replace(";", "~")}, {"reader": {"separator": "~"}}, TEXTS),
    "names": (
        {"a.csv": "a dog;5\n"},
        {"reader": {"names": ["prompt", "seed"]}},
        [{"prompt": "a dog", "seed": "5"}],
    ),
    "no quotes": (
        {"a.csv": 'prompt,n\n"a" dog,1\n'},
        {"reader": {"quotes": False}},
        [{"prompt": '"a" dog', "n": "1"}],
    ),
    "quoted tsv of pandas": ({"a.tsv": tsv(TSV_QUOTED, csv.QUOTE_MINIMAL)}, {}, QUOTED_ROWS),
    "all quoted tsv": (
        {"a.tsv": tsv([["prompt", "n"], ["a", "b"]], csv.QUOTE_ALL)},
        {},
        [{"prompt": "a", "n": "b"}],
    ),
    "tsv of Excel": (
        {"a.tsv": 'prompt\tn\r\n"a dog, wet"\t1\r\na cat\t2\r\n'},
        {},
        [{"prompt": "a dog, wet", "n": "1"}, {"prompt": "a cat", "n": "2"}],
    ),
    "unquoted tsv": (
        {"a.tsv": 'prompt\tn\n"Hi" she said\t1\n"a" "b"\t2\n'},
        {},
        [{"prompt": '"Hi" she said', "n": "1"}, {"prompt": '"a" "b"', "n": "2"}],
    ),
    "tsv whose quotes are a choice": (
        {"a.tsv": 'prompt\tn\n"a dog"\t1\n'},
        {"reader": {"quotes": True}},
        [{"prompt": "a dog", "n": "1"}],
    ),
    "empty cells": (
        {"a.csv": 'prompt,negative_prompt,n\na dog,,""\n'},
        {},
        [{"prompt": "a dog", "negative_prompt": None, "n": None}],
    ),
    "cp1252": (
        {"a.csv": "prompt\ncafé\n".encode("cp1252")},
        {"reader": {"encoding": "cp1252"}},
        [{"prompt": "café"}],
    ),
    "utf-16": (
        {"a.tsv": "prompt\tn\ncafé\t1\n".encode("utf-16")},
        {"reader": {"encoding": "utf-16"}},
        [{"prompt": "café", "n": "1"}],
    ),
    "styles.csv": (
        {"styles.csv": "\ufeff" + STYLES},
        {},
        [
            {"name": "film", "prompt": "{prompt} on film", "negative_prompt": "blurry"},
            {"name": "plain", "prompt": "a cat", "negative_prompt": None},
        ],
    ),
    # by content
    "csv in txt": ({"a.txt": 'prompt,seed\n"a dog, wet",5\na cat,6\n'}, {}, TEXTS),
    "prompts with commas in txt": (
        {"a.txt": "dog, photo\ncat, photo\n"},
        {},
        [{"prompt": "dog, photo"}, {"prompt": "cat, photo"}],
    ),
    "prompts in brackets": (
        {"a.txt": "[a:b:0.5] dog\n{a|b} cat\n"},
        {},
        [{"prompt": "[a:b:0.5] dog"}, {"prompt": "{a|b} cat"}],
    ),
    "jsonl in txt": ({"a.txt": lines(*SEEDS)}, {}, SEEDS),
    "csv forced to be txt": (
        {"a.txt": "prompt,seed\n"},
        {"reader": {"format": "txt"}},
        [{"prompt": "prompt,seed"}],
    ),
    "jsonl in json": ({"a.json": lines(*SEEDS)}, {}, SEEDS),
    "one line of jsonl in json": ({"a.json": lines(SEEDS[0])}, {}, SEEDS[:1]),
    "json in jsonl": ({"a.jsonl": json.dumps(SEEDS, indent=1)}, {}, SEEDS),
    "compact json in jsonl": ({"a.jsonl": json.dumps(SEEDS)}, {}, SEEDS),
    "parquet without suffix": ({"a": parquet(SEEDS)}, {}, SEEDS),
    "jsonl without suffix": ({"a": lines(*SEEDS)}, {}, SEEDS),
    "one object in txt": ({"a.txt": lines(SEEDS[0])}, {}, SEEDS[:1]),
    "objects as prompts in txt": ({"a.txt": '{"scene": 1}\n'}, {}, [{"prompt": '{"scene": 1}'}]),
    "one object without suffix": ({"a": lines(SEEDS[0])}, {}, SEEDS[:1]),
    "document without suffix": ({"a": json.dumps(SEEDS, indent=1)}, {}, SEEDS),
    "diffusiondb's json": (
        {
            "part-1.json": json.dumps({"x.png": {"p": "a dog", "se": 5, "sa": "k_euler"}}),
            "x.png": PNG,
        },
        {"columns": {"prompt": "p"}},
        [{"id": "x.png", "p": "a dog", "se": 5, "sa": "k_euler"}],
    ),
    "csv without suffix": ({"a.data": 'prompt,seed\n"a dog, wet",5\na cat,6\n'}, {}, TEXTS),
    "named format": ({"a.dat": "a dog, wet\na cat\n"}, {"reader": {"format": "txt"}}, PAIR),
    # JSON documents
    "prompts": ({"a.json": json.dumps({"prompts": ["a dog, wet", "a cat"]})}, {}, PAIR),
    "coco": ({"a.json": json.dumps(COCO)}, BY_CAPTION, CAPTION),
    "field": (
        {"a.json": json.dumps({"v": {"x": SEEDS, "y": PAIR}})},
        {"reader": {"field": "v.x"}},
        SEEDS,
    ),
    "by id": (
        {"a.json": json.dumps({"x": SEEDS[0], "y": SEEDS[1]})},
        {},
        [{"id": "x", **SEEDS[0]}, {"id": "y", **SEEDS[1]}],
    ),
    "texts by id": ({"a.json": json.dumps({"x": "a dog"})}, {}, [{"id": "x", "prompt": "a dog"}]),
    "10,000 ids": ({"a.json": json.dumps(KEYED)}, {}, [{"id": k, "prompt": "p"} for k in KEYED]),
    "pandas' columns": ({"a.json": COLUMNS}, {}, SEEDS),
    "pandas' split": ({"a.json": FRAME.to_json(orient="split")}, {}, SEEDS),
    "pandas' table": ({"a.json": FRAME.to_json(orient="table", index=False)}, {}, SEEDS),
    "pandas' records": ({"a.json": FRAME.to_json(orient="records")}, {}, SEEDS),
    "lists of columns": (
        {"a.json": json.dumps({"prompt": ["a", "b"], "n": [1, 2]})},
        {},
        [{"prompt": "a", "n": 1}, {"prompt": "b", "n": 2}],
    ),
    # faults of single rows
    "one bad line": ({"a.jsonl": BROKEN_LINE}, {}, [{"prompt": "a dog"}, BAD, {"prompt": "a cat"}]),
    "half a surrogate": (
        {"a.jsonl": lines("a dog", "\ud83d")},
        {},
        [{"prompt": "a dog"}, Fault("line 2 column 'prompt' = half a surrogate")],
    ),
    "half a surrogate in a document": (
        {"a.json": json.dumps([{"prompt": "a", "x": {"k": ["\udc00"]}}, "a cat"])},
        {},
        [Fault("element 0 column 'x' = half a surrogate"), {"prompt": "a cat"}],
    ),
    "a number as a row": (
        {"a.json": '["a cat", 3]'},
        {},
        [{"prompt": "a cat"}, Fault("element 1 = 3: must be an object")],
    ),
    "parquet text that is no UTF-8": (
        {"a.parquet": parquet(pa.table({"prompt": NOT_UTF8}))},
        {},
        [{"prompt": "a"}, Fault("row 1 column 'prompt' = bytes that are not UTF-8")],
    ),
    "arrow text that is no UTF-8": (
        {"a.arrow": ipc(pa.table({"prompt": NOT_UTF8.dictionary_encode()}))},
        {},
        [{"prompt": "a"}, Fault("row 1 column 'prompt' = bytes that are not UTF-8")],
    ),
    # AUTOMATIC1111's lines
    "options": ({"a.txt": A1111}, {}, A1111_ROWS),
    "unknown option": (
        {"a.txt": '--prompt "a" --hires 3\na cat\n'},
        {},
        [Fault("line 1 = '--hires': must be one of --prompt"), {"prompt": "a cat"}],
    ),
    "open quote": (
        {"a.txt": '--prompt "a\na cat\n'},
        {},
        [Fault("line 1 = No closing quotation: must be"), {"prompt": "a cat"}],
    ),
    # compression and Arrow
    "zstd": ({"a.jsonl.zst": z(lines(*SEEDS))}, {}, SEEDS),
    "zstd csv": ({"a.csv.zst": z(SEMI)}, {}, TEXTS),
    "xz tsv": ({"a.tsv.xz": lzma.compress(SEMI.replace(";", "\t").encode())}, {}, TEXTS),
    "bz2 json": ({"a.json.bz2": bz2.compress(json.dumps(SEEDS).encode())}, {}, SEEDS),
    "gzip without suffix": ({"a": gzip.compress(lines(*SEEDS).encode())}, {}, SEEDS),
    "arrow file": ({"a.arrow": ipc(SEEDS)}, {}, SEEDS),
    "arrow stream": ({"a.arrows": ipc(SEEDS, stream=True)}, {}, SEEDS),
    "stream named arrow": ({"a.arrow": ipc(SEEDS, stream=True, compression="zstd")}, {}, SEEDS),
    "feather": ({"a.feather": feather()}, {}, SEEDS),
    "lz4 feather": ({"a.feather": feather(compression="lz4")}, {}, SEEDS),
    "arrow without suffix": ({"a": ipc(SEEDS)}, {}, SEEDS),
    "string views": (
        {
            "a.arrow": ipc(
                pa.table({"prompt": pa.array(["a dog", None, "x" * 20], pa.string_view())})
            )
        },
        {},
        [{"prompt": "a dog"}, {"prompt": None}, {"prompt": "x" * 20}],
    ),
    "save_to_disk": ({"d": saved(SEEDS), "d/cache-1.arrow": b"old"}, {}, SEEDS),
    "a split of save_to_disk": (
        {"d": saved(None, train=SEEDS, test=PAIR)},
        {"path": "d/train"},
        SEEDS,
    ),
    # several files
    "dictionary and string": (
        {"a.parquet": parquet(DICTIONARY), "b.parquet": parquet([{"prompt": "a dog", "x": 1}])},
        {},
        [{"prompt": "a cat", "x": 2}, {"prompt": "a dog", "x": 1}],
    ),
    "csv and jsonl": (
        {
            "a.csv": "prompt,seed,x\na,5,007\n",
            "b.jsonl": lines({"prompt": "b", "seed": 6, "x": 0.5}),
        },
        {},
        [{"prompt": "a", "seed": "5", "x": "007"}, {"prompt": "b", "seed": "6", "x": "0.5"}],
    ),
    "csv and parquet": (
        {
            "a.csv": "prompt,x,y\na,1,\n",
            "b.parquet": parquet([{"prompt": "b", "x": 2**60, "y": True}]),
        },
        {},
        [{"prompt": "a", "x": "1", "y": None}, {"prompt": "b", "x": str(2**60), "y": "true"}],
    ),
    "json text and parquet": (
        {
            "a.jsonl": lines({"prompt": "a", "x": "s"}, {"prompt": "b", "x": [1]}),
            "b.parquet": parquet([{"prompt": "c", "x": "t"}]),
        },
        {},
        [{"prompt": "a", "x": '"s"'}, {"prompt": "b", "x": "[1]"}, {"prompt": "c", "x": '"t"'}],
    ),
    "captions": (CARD, {}, CAPTIONS),
    "one caption": (
        {"a.png": PNG, "a.txt": "a dog"},
        {"path": ""},
        [{"id": "a", "prompt": "a dog"}],
    ),
    "captions without pictures": (
        {"1.txt": "a dog, wet", "2.txt": "a cat"},
        {"reader": {"format": "captions"}},
        CAPTIONS,
    ),
    "captions in folders": (
        {"b/1.png": PNG, "b/1.txt": "b1", "a/1.png": PNG, "a/1.txt": ""},
        {},
        [{"id": "1", "prompt": ""}, {"id": "1", "prompt": "b1"}],
    ),
}

ERRORS = {
    "git-lfs": ({"a.txt": LFS}, {}, "a.txt = a pointer of git-lfs, .* `git lfs pull`"),
    "git-lfs parquet": ({"a.parquet": LFS}, {}, "a pointer of git-lfs, .* `git lfs pull`"),
    "git-lfs arrow": ({"a.arrow": LFS}, {}, "a pointer of git-lfs, .* `git lfs pull`"),
    "html": ({"a.csv": HTML}, {}, "a page of HTML or XML.*Download it again"),
    "html parquet": ({"a.parquet": HTML}, {}, "a page of HTML or XML"),
    "xml jsonl": ({"a.jsonl": '<?xml version="1.0"?><Error/>'}, {}, "a page of HTML or XML"),
    "picture in txt": ({"a.txt": PNG}, {}, "a.txt = a picture: must be text"),
    "binary in txt": ({"a.txt": b"a\0b"}, {}, "a.txt = binary data: must be text"),
    "excel": ({"a.xlsx": b"PK\x03\x04\x14\0"}, {}, "an Excel workbook.*Save the sheet as CSV"),
    "gzip named csv": (
        {"a.csv": gzip.compress(b"prompt\na\n")},
        {},
        r"compressed with gzip.*\.gz at",
    ),
    "parquet named csv": ({"a.csv": parquet(SEEDS)}, {}, "Parquet: must be named so"),
    "arrow named parquet": ({"a.parquet": ipc(SEEDS)}, {}, "Arrow: must be named so"),
    "empty parquet": ({"a.parquet": ""}, {}, "an empty file: must hold rows"),
    "utf-16": ({"a.csv": "prompt\na\n".encode("utf-16")}, {}, "reader.encoding=utf-16"),
    "latin-1": (
        {"a.csv": "prompt\ncafé\n".encode("latin-1")},
        {},
        "line 2 = .*reader.encoding=cp1252",
    ),
    "unknown suffix": ({"a.dat": "a dog\n"}, {}, "text without a known suffix.*reader.format=txt"),
    "cut zstd": ({"a.csv.zst": z(SEMI)[:-4]}, {}, "a.csv.zst = .*must be a complete file of CSV"),
    "cut arrow": ({"a.arrow": ipc(SEEDS)[:200]}, {}, "a.arrow = .*must be a complete Arrow file"),
    "damaged arrow": (
        {"a.arrow": b"ARROW1\0\0" + b"\xff" * 40},
        {},
        "must be a complete Arrow file",
    ),
    "delta": (
        {"_delta_log/0.json": "{}", "a.parquet": parquet(SEEDS)},
        {},
        r"a Delta table.*plain files.*delta_scan\('.*/t'\)",
    ),
    "iceberg": (
        {"metadata/v1.metadata.json": "{}", "data/a.parquet": parquet(SEEDS)},
        {},
        "an Iceberg",
    ),
    "hudi": ({".hoodie/x": "", "a.parquet": parquet(SEEDS)}, {}, "a Hudi table"),
    "an output": (
        {"job.yaml": "", "plan.parquet": "", "data/0.parquet": parquet(SEEDS)},
        {},
        "an output of sdbatch.*folder data/",
    ),
    "splits": (
        {
            "train-0-of-2.parquet": parquet(SEEDS),
            "train-1-of-2.parquet": parquet(SEEDS),
            "test-0-of-1.parquet": parquet(PAIR),
        },
        {},
        r"several splits, test \(1 file, .*train \(2 files.*such as .*/t/test-\*\.parquet",
    ),
    "split folders": (
        {"train/a.csv": SEMI, "val/a.csv": SEMI},
        {},
        r"several splits.* such as .*/t/train,",
    ),
    "splits of save_to_disk": (
        {"d": saved(None, train=SEEDS, test=PAIR)},
        {},
        "several splits, te.*d/test,",
    ),
    "several lists": (
        {"a.json": json.dumps({"x": SEEDS, "y": PAIR})},
        {},
        "an object of 2 keys.*field=x or y",
    ),
    "no such field": (
        {"a.json": json.dumps({"x": SEEDS})},
        {"reader": {"field": "z"}},
        "no 'z': prompts.reader.field must be where.*field=x",
    ),
    "rows too deep": ({"a.json": json.dumps({"a": {"b": {"c": SEEDS}}})}, {}, r"field=a\.b\.c"),
    "no rows": ({"a.json": '{"a": 1}'}, {}, r"an object of 1 keys \('a'\): must be a list"),
    "key for no file": (
        {"a.csv": SEMI},
        {"reader": {"field": "x"}},
        "prompts.reader.field = 'x': is for json",
    ),
    "wrong names": (
        {"a.csv": "a,5\nb\n"},
        {"reader": {"names": ["prompt", "n"]}},
        "line 2 = 1 fields: must be 2",
    ),
    "all lines bad": ({"a.jsonl": "a dog\na cat\n"}, {}, "a.jsonl line 1 = .*must be JSON"),
    "value without a name": (
        {"a.csv": "prompt,seed,\na,5,x\n"},
        {},
        "line 2 = a value in a column without",
    ),
    "incompatible": (
        {
            "a.parquet": parquet([{"prompt": "a", "x": [1]}]),
            "b.parquet": parquet([{"prompt": "a", "x": 1}]),
        },
        {},
        "b.parquet = .*x has incompatible",
    ),
    "captions that are no folder": (
        {"a.txt": "a dog"},
        {"reader": {"format": "captions"}},
        "must be a folder, as prompts.reader",
    ),
    "prompts in brackets without suffix": ({"a": "[a:b:0.5] dog\n"}, {}, "text without a known"),
    "only documents": (
        {"LICENSE.txt": "MIT", "README.md": "x", "a.png": PNG},
        {},
        "no table in the folder. It holds .*LICENSE.txt: a document.*a.png: a picture",
    ),
}


def layout(case, tmp_path):
    files, prompts, expected = case
    prompts = {**prompts}
    path = prompts.pop("path", next(iter(files)) if len(files) == 1 else "")
    if "d" in files and not path.startswith("d"):
        path = "d"
    return (*open_job(files, path, tmp_path, prompts), expected)


@pytest.mark.parametrize("name", ROWS)
def test_layout_gives_its_rows(tmp_path, name):
    job, opened, expected = layout(ROWS[name], tmp_path)
    found = read_all(job, opened)
    assert len(found) == len(expected)
    for row, wanted in zip(found, expected, strict=True):
        if isinstance(wanted, Fault):
            assert re.match(wanted, row), row
        else:
            assert row == dict.fromkeys(row) | wanted  # what it does not set is null


@pytest.mark.parametrize("name", ERRORS)
def test_layout_that_is_no_table_is_an_error_with_the_way_out(tmp_path, name):
    with pytest.raises(PromptTableError, match=ERRORS[name][2]) as caught:
        layout(ERRORS[name], tmp_path)
    assert "\n" not in str(caught.value)

"""Prompts in lists: a row with several captions, each a prompt with a key of its own."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sdbatch.errors import PromptTableError
from sdbatch.output.plan import make_plan
from sdbatch.prompts import table
from sdbatch.prompts.check import check_rows
from sdbatch.prompts.requests import resolve_requests, row_seed
from sdbatch.prompts.table import open_table

ROWS = [
    {"image": "1.jpg", "caption": ["a dog", "a brown dog"], "w": 64},
    {"image": "2.jpg", "caption": ["a cat"], "w": None},
    {"image": "3.jpg", "caption": [], "w": 72},
    {"image": "4.jpg", "caption": ["x", None, "z"], "w": 80},
    {"image": "5.jpg", "caption": None, "w": 80},
]
COLUMNS = {"prompt": "caption", "width": "w"}
TEXTS = ["a dog", "a brown dog", "a cat", None, "x", None, "z", None]
KEYS = ["0-0", "0-1", "1-0", "2-0", "3-0", "3-1", "3-2", "4-0"]


@pytest.fixture
def job_of(make_job, tmp_path):
    def build(rows=ROWS, size="auto", **prompts):
        path = tmp_path / "t.parquet"
        rows = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows)
        pq.write_table(rows.rename_columns({"image": "file"}), path, row_group_size=2)
        prompts = {"path": str(path), "columns": COLUMNS, **prompts}
        return make_job(prompts=prompts, output={"images_per_shard": size})

    return build


def requests_of(job):
    planned = make_plan(job, open_table(job.prompts), None)
    sources = {source.name: source for source in planned.table.sources}
    parts = []
    for shard in planned.shards:
        start, stop = shard.rows(job.prompts.images_per_row)
        source = sources[shard.source]
        rows = table.read_rows(source, start, stop, planned.table.schema, job.prompts.rows)
        columns, extras = planned.table.columns, planned.table.extras
        parts.append(resolve_requests(rows, shard, planned.job, columns, extras))
    return pa.concat_tables(parts).to_pylist()


def test_each_caption_is_a_prompt_with_the_key_of_its_row_and_its_place(job_of):
    rows = requests_of(job_of())
    assert [row["prompt"] for row in rows] == TEXTS
    assert [row["row_key"] for row in rows] == KEYS
    assert [row["file"][0] for row in rows] == list("11234445")
    assert [row["width"] for row in rows] == [64, 64, 64, 72, 80, 80, 80, 80]
    assert rows[1]["seed"] == row_seed(0, "0-1")
    assert [row["error"] is None for row in rows] == [text is not None for text in TEXTS]


def test_captions_have_the_rows_id_in_their_keys(job_of):
    rows = requests_of(job_of(columns={**COLUMNS, "id": "file"}))
    assert [row["row_key"] for row in rows[:3]] == ["1.jpg-0", "1.jpg-1", "2.jpg-0"]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("copies", [1, 3])
def test_requests_of_captions_do_not_depend_on_the_size_of_shards(job_of, size, copies):
    def without_key(rows):
        return [{**row, "key": None} for row in rows]

    whole = requests_of(job_of(size=100, images_per_row=copies))
    assert without_key(requests_of(job_of(size=size, images_per_row=copies))) == without_key(whole)
    assert len(whole) == copies * len(TEXTS)


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.string()),
        pa.large_list(pa.large_string()),
        pa.list_(pa.string_view()),
        pa.list_view(pa.string()),
    ],
    ids=str,
)
def test_captions_are_read_from_every_type_of_list(job_of, kind):
    rows = pa.Table.from_pylist(ROWS)
    lists = pa.array([row["caption"] for row in ROWS], kind)
    rows = rows.set_column(1, "caption", lists)
    assert [row["prompt"] for row in requests_of(job_of(rows))] == TEXTS


@pytest.mark.parametrize("name", ["t.jsonl", "t.json", None])
def test_captions_are_read_from_json_and_from_the_job_file(write, make_job, name):
    rows = [{"id": row["image"], "caption": row["caption"]} for row in ROWS[:2]]
    prompts = {"columns": {"prompt": "caption", "id": "id"}}
    if name is None:
        prompts |= {"rows": rows, "path": None}
    elif name == "t.json":
        prompts["path"] = str(write(name, json.dumps(rows)))
    else:
        prompts["path"] = str(write(name, "".join(f"{json.dumps(row)}\n" for row in rows)))
    found = requests_of(make_job(prompts=prompts))
    assert [row["row_key"] for row in found] == ["1.jpg-0", "1.jpg-1", "2.jpg-0"]


def test_rows_of_a_second_file_are_numbered_after_those_of_the_first(write, make_job, tmp_path):
    for name in ("a", "b"):
        write(f"t/{name}.jsonl", '{"prompt": ["x", "y"]}\n{"prompt": ["z"]}\n')
    job = make_job(prompts={"path": str(tmp_path / "t")})
    keys = ["0-0", "0-1", "1-0", "2-0", "2-1", "3-0"]
    assert [row["row_key"] for row in requests_of(job)] == keys
    assert check_rows(job, open_table(job.prompts), whole=True).rows == 6


def test_a_limit_counts_captions(job_of):
    assert [row["row_key"] for row in requests_of(job_of(limit=2))] == ["0-0", "0-1"]


def test_a_list_of_anything_else_is_no_prompt(job_of):
    rows = pa.table({"image": ["1"], "caption": [[{"raw": "a dog"}]], "w": [64]})
    with pytest.raises(PromptTableError, match=r"'caption' = list<.*: must hold text to be used"):
        open_table(job_of(rows).prompts)

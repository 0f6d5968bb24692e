"""What columns mean: switched off, overruling the job, near misses, ids, names that collide."""

import decimal
import math
import shlex

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sdbatch.errors import PromptTableError
from sdbatch.job import load, parse
from sdbatch.output.plan import make_plan
from sdbatch.prompts import requests, table
from sdbatch.prompts.columns import describe_columns
from sdbatch.prompts.table import open_table


@pytest.fixture
def job_of(make_job, tmp_path):
    """Return a function from rows (or a pa.Table) and sections to a job over them."""

    def build(rows, sampling=None, **prompts):
        rows = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows)
        path = tmp_path / "table.parquet"
        pq.write_table(rows, path)
        return make_job(prompts={"path": str(path), **prompts}, sampling=sampling or {})

    return build


def resolved(job):
    planned = make_plan(job, open_table(job.prompts), None)
    source, columns = planned.table.sources[0], planned.table.columns
    parts = []
    for shard in planned.shards:
        rows = table.read_rows(source, *shard.rows(1), planned.table.schema)
        parts.append(
            requests.resolve_requests(rows, shard, planned.job, columns, planned.table.extras)
        )
    return pa.concat_tables(parts)


def notes(job):
    opened = open_table(job.prompts)
    return [*describe_columns(job.prompts, job.sampling, opened.columns, opened.names)]


# --- switched off -------------------------------------------------------------------------------


def test_a_column_that_is_switched_off_is_neither_used_nor_copied_and_the_plan_says_so(job_of):
    rows = [{"prompt": "a", "sampler": 4, "width": 171, "own": 1}]
    job = job_of(rows, columns={"sampler": None, "width": None})
    opened = open_table(job.prompts)
    assert opened.columns == {"prompt": "prompt"}
    assert opened.extras.names == ["own"]
    (request,) = resolved(job).to_pylist()
    assert (request["sampler"], request["width"], request["error"]) == ("dpmpp_2m", 64, None)
    assert [note for note in notes(job) if "not copied" in note] == [
        "column 'sampler' is not used and not copied: prompts.columns.sampler = null",
        "column 'width' is not used and not copied: prompts.columns.width = null",
    ]


def test_a_side_that_is_switched_off_does_not_make_shards_smaller(job_of):
    rows = [{"prompt": "a", "height": 4096, "width": 4096}]
    assert make_plan(job_of(rows), open_table(job_of(rows).prompts), None).largest == (4096, 4096)
    job = job_of(rows, columns={"height": None, "width": None})
    assert make_plan(job, open_table(job.prompts), None).largest == (64, 64)


def test_columns_can_be_switched_off_on_the_command_line(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text("prompts: {path: p.csv}\nmodel: m\noutput: {path: o}\n")
    job = load(path, ["prompts.columns.sampler=null"])
    assert job.prompts.columns == {"sampler": None}


def test_an_id_that_is_switched_off_is_still_copied(job_of):
    opened = open_table(job_of([{"prompt": "a", "id": 7}], columns={"id": None}).prompts)
    assert (opened.columns, opened.extras.names) == ({"prompt": "prompt"}, ["id"])


def test_a_prompt_column_cannot_be_switched_off(job_of):
    with pytest.raises(PromptTableError, match=r"^prompts\.columns\.prompt = null: the table has"):
        open_table(job_of([{"prompt": "a"}], columns={"prompt": None}).prompts)


# --- overruling -----------------------------------------------------------------------------------


def test_columns_that_overrule_explicit_values_of_the_job_are_named(job_of):
    rows = [{"prompt": "a", "width": 64, "cfg": 3.0, "eta": 0.0}]
    job = job_of(
        rows,
        sampling={"width": 512, "guidance_scale": 7.5, "clip_skip": 1},
        columns={"guidance_scale": "cfg"},
    )
    assert notes(job) == [
        "column 'cfg' overrules sampling.guidance_scale = 7.5 in every row where it is not empty; "
        "prompts.columns.guidance_scale=null turns it off",
        "column 'width' overrules sampling.width = 512 in every row where it is not empty; "
        "prompts.columns.width=null turns it off",
    ]


def test_a_value_is_explicit_if_set_gives_it(job_of, tmp_path):
    table_path = job_of([{"prompt": "a", "width": 64, "height": 64}]).prompts.path
    path = tmp_path / "job.yaml"
    path.write_text(f"prompts: {{path: {table_path}}}\nmodel: m\noutput: {{path: o}}\n")
    assert notes(load(path)) == []
    (note,) = notes(load(path, ["sampling.width=512"]))
    assert note.startswith("column 'width' overrules sampling.width = 512 ")


def test_of_the_job_that_an_output_records_only_values_other_than_the_default_are_explicit(job_of):
    job = job_of([{"prompt": "a", "width": 64, "eta": 0.0}], sampling={"width": 128})
    recorded = parse(job.model_dump(mode="json"))
    assert [note.partition(" in ")[0] for note in notes(recorded)] == [
        "column 'width' overrules sampling.width = 128"
    ]


# --- near misses ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "key", "option"),
    [
        (" seed", "seed", """'prompts.columns.seed=" seed"'"""),
        ("steps", "number of steps", "prompts.columns.num_inference_steps=steps"),
        ("step", "number of steps", "prompts.columns.num_inference_steps=step"),
        ("cfg_scale", "guidance scale", "prompts.columns.guidance_scale=cfg_scale"),
        ("cfg", "guidance scale", "prompts.columns.guidance_scale=cfg"),
        ("CFG scale", "guidance scale", "'prompts.columns.guidance_scale=CFG scale'"),
        ("Negative Prompt", "negative prompt", "'prompts.columns.negative_prompt=Negative Prompt'"),
        ("neg", "negative prompt", "prompts.columns.negative_prompt=neg"),
        ("sampler_name", "sampler", "prompts.columns.sampler=sampler_name"),
        ("Sampling method", "sampler", "'prompts.columns.sampler=Sampling method'"),
        ("scheduler", "sampler", "prompts.columns.sampler=scheduler"),
        ("w", "width", "prompts.columns.width=w"),
        ("Clip skip", "clip skip, counted from 0", "'prompts.columns.clip_skip=Clip skip'"),
    ],
)
def test_a_column_that_seems_to_hold_a_key_is_named_with_the_way_to_use_it(
    job_of, tmp_path, name, key, option
):
    job = job_of([{"prompt": "a", name: 1}])
    assert notes(job) == [f"column {name!r} is copied, not used: if it is the {key}, set {option}"]
    path = tmp_path / "job.yaml"
    path.write_text("prompts: {path: p.csv}\nmodel: m\noutput: {path: o}\n")
    assert list(load(path, shlex.split(option)).prompts.columns.values()) == [name]


def test_a_near_miss_that_the_job_has_decided_on_is_not_named(job_of):
    rows = [{"prompt": "a", "steps": 1, "cfg": 1.0, "w": 8, "width": 64}]
    job = job_of(rows, columns={"num_inference_steps": "steps", "guidance_scale": None})
    assert [note for note in notes(job) if "if it is" in note] == []
    kept = job_of(rows, keep=["steps", "cfg"], columns={"width": None})
    assert [note for note in notes(kept) if "if it is" in note] == []
    one = job_of(rows, keep=["steps"])
    assert [note.split(":")[0] for note in notes(one) if "if it is" in note] == [
        "column 'cfg' is not used"
    ]


@pytest.mark.parametrize(
    ("names", "likely"),
    [
        (["url", "Prompt"], "Prompt"),
        (["url", "TEXT"], "TEXT"),
        (["url", "sentence"], "sentence"),
        (["text", "caption"], "caption"),
        (["file_name", "Caption text"], "file_name"),  # no name says it: the first of text
        (["1", "title"], "title"),  # a number before it
        (["url", "captions"], "captions"),
    ],
)
def test_without_a_prompt_column_the_likely_one_is_suggested_by_its_name(job_of, names, likely):
    row = {name: 1 if name == "1" else "a" for name in names}
    row = {name: ["a"] if name == "captions" else cell for name, cell in row.items()}
    with pytest.raises(PromptTableError, match=rf"--set prompts\.columns\.prompt={likely}$"):
        open_table(job_of([row]).prompts)


def test_a_table_whose_first_line_seems_to_be_a_row_comes_with_the_way_out(tmp_path, make_job):
    path = tmp_path / "table.csv"
    path.write_text("a dog,5\na cat,6\n")
    job = make_job(prompts={"path": str(path)})
    words = r"If its first line is a row, name the columns: --set prompts\.reader\.names="
    with pytest.raises(PromptTableError, match=words):
        open_table(job.prompts)
    named = make_job(prompts={"path": str(path), "reader": {"names": ["prompt", "seed"]}})
    assert open_table(named.prompts).rows == 2
    path.write_text("caption,seed\na dog,5\n")
    with pytest.raises(PromptTableError, match=r"prompts\.columns\.prompt=caption$"):
        open_table(job.prompts)


# --- ids ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "keys"),
    [
        (pa.array([10, 11]), ["10", "11"]),
        (pa.array([10.0, math.nan, None, 2.5]), ["10", None, None, "2.5"]),
        (pa.array([2.0**53, 2.0**53 + 2, math.inf]), [str(2**53), None, None]),
        (pa.array([2.0**24, 2.0**24 + 2], pa.float32()), [str(2**24), None]),
        (pa.array([2**63, 2**64 - 1], pa.uint64()), [str(2**63), str(2**64 - 1)]),
        (pa.array([-0.0, -3.0]), ["0", "-3"]),
        (
            pa.array([decimal.Decimal("10.00"), decimal.Decimal("12345678901234567890.50")]),
            ["10", "12345678901234567890.5"],
        ),
        (pa.array([decimal.Decimal("100")]), ["100"]),
        (pa.array(["10.0", "", " x"]), ["10.0", None, " x"]),
        (pa.array(["x", None, "x"]).dictionary_encode(), ["x", None, "x"]),
        (pa.array([10.0, math.nan]).dictionary_encode(), ["10", None]),
    ],
    ids=lambda value: str(value.type) if isinstance(value, pa.Array) else "",
)
def test_an_id_is_exact_and_the_same_in_every_type_or_its_row_fails(job_of, ids, keys):
    rows = pa.table({"prompt": ["a"] * len(ids), "name": ids})
    result = resolved(job_of(rows, columns={"id": "name"})).to_pylist()
    assert [row["row_key"] for row in result] == keys
    assert [row["error"] is None for row in result] == [key is not None for key in keys]
    assert all(row["error"].startswith("id = ") for row in result if row["row_key"] is None)


def test_an_id_that_a_float_may_have_rounded_says_so(job_of):
    rows = pa.table({"prompt": ["a"], "name": [2.0**53 + 2]})
    (row,) = resolved(job_of(rows, columns={"id": "name"})).to_pylist()
    assert row["error"] == (
        "id = 9007199254740994.0: must be text or a whole number, as a float is not exact above "
        "2**53"
    )


@pytest.mark.parametrize("ids", [pa.array([True]), pa.array([b"x"])])
def test_an_id_of_another_type_is_rejected(job_of, ids):
    rows = pa.table({"prompt": ["a"], "name": ids})
    with pytest.raises(PromptTableError, match=r"'name' = .*must hold text or numbers to be used"):
        open_table(job_of(rows, columns={"id": "name"}).prompts)


def test_seeds_stay_when_an_empty_cell_makes_a_column_of_ids_floats(job_of):
    whole = pa.table({"prompt": ["a", "b"], "n": pa.array([10, 11])})
    floats = pa.table({"prompt": ["a", "b", "c"], "n": pa.array([10, 11, None], pa.float64())})
    first, second = (
        resolved(job_of(rows, columns={"id": "n"}))["seed"] for rows in (whole, floats)
    )
    assert first.to_pylist() == second.to_pylist()[:2]


# --- names that collide -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["WIDTH", "Seed", "Negative_Prompt"])
def test_a_name_of_a_key_in_another_case_is_an_error_that_says_how_to_use_it(job_of, name):
    rows = [{"prompt": "a", name: 1, "n": 1}]
    key = name.lower()
    words = (
        rf"^column '{name}' of the table = the name of the output column '{key}' but for its case, "
        rf"which DuckDB ignores: .*--set prompts\.columns\.{key}={name}; else leave it out with "
        rf"--set prompts\.columns\.{key}=null, or rename it\.$"
    )
    with pytest.raises(PromptTableError, match=words):
        open_table(job_of(rows).prompts)
    assert open_table(job_of(rows, columns={key: None}).prompts).extras.names == ["n"]


@pytest.mark.parametrize("name", ["SHA256", "Row_Key", "Image_SHA256", "KEY"])
def test_a_name_of_another_output_column_in_another_case_is_an_error(job_of, name):
    words = rf"^column '{name}' .*but for its case.*: rename it, or .*prompts\.keep=\[n\]"
    with pytest.raises(PromptTableError, match=words):
        open_table(job_of([{"prompt": "a", name: "x", "n": 1}]).prompts)


def test_two_columns_that_differ_only_in_case_are_an_error(job_of):
    rows = [{"prompt": "a", "Tag": 1, "tag": 2, "n": 3}]
    with pytest.raises(PromptTableError, match=r"'Tag' and 'tag' .*only in case.*keep=\[n\]'"):
        open_table(job_of(rows).prompts)
    assert open_table(job_of(rows, keep=["tag"]).prompts).extras.names == ["tag"]


def test_a_name_of_a_stages_column_in_another_case_is_an_error(job_of):
    with pytest.raises(PromptTableError, match=r"'Fidelity' .*'fidelity', but for its case"):
        open_table(job_of([{"prompt": "a", "Fidelity": 1}]).prompts, ["fidelity"])


# --- the file's name ---------------------------------------------------------------------------


def test_the_name_of_a_rows_file_is_a_column_on_demand(write, make_job, tmp_path):
    write("t/a.csv", "prompt,n\nx,1\n")
    write("t/b.csv", "prompt,n\ny,2\n")
    job = make_job(prompts={"path": str(tmp_path / "t"), "source": "file", "keep": []})
    opened = open_table(job.prompts)
    assert opened.extras == pa.schema([("file", pa.string())])
    names = [table.read_rows(s, 0, 1, opened.schema)["file"].to_pylist() for s in opened.sources]
    assert names == [["a.csv"], ["b.csv"]]
    with pytest.raises(PromptTableError, match=r"^prompts\.source = 'n': must be a name that"):
        open_table(job.prompts.updated(source="n"))
    with pytest.raises(PromptTableError, match=r"column 'Key' .*output column 'key', but for"):
        open_table(job.prompts.updated(source="Key"))

"""A prompt table that the job file itself holds."""

import pytest

from sdbatch.errors import JobError, PromptTableError
from sdbatch.job import parse
from sdbatch.output import plan
from sdbatch.prompts.table import open_table, read

JOB = {"model": "builtin:shapes", "output": {"path": "out"}}
ROWS = [
    {"prompt": 'a red dog: "big"\nand ü', "seed": 2**53 + 1, "tags": ["a"], "guidance_scale": 3},
    {"prompt": "", "tags": None},
]


def job_of(**prompts):
    return parse({**JOB, "prompts": prompts})


def test_rows_are_read_as_any_tables():
    job = job_of(rows=ROWS, images_per_row=2)
    table = open_table(job.prompts)
    planned = plan.make(job, table, None)
    assert (table.rows, planned.shards[0].images) == (2, 4)
    [source] = table.sources
    rows = read(source, 0, 2, table.schema).to_pylist()
    assert rows[0] == {
        "prompt": 'a red dog: "big"\nand ü',
        "seed": 2**53 + 1,
        "guidance_scale": 3,
        "tags": ["a"],
    }
    assert rows[1] == {"prompt": "", "seed": None, "guidance_scale": None, "tags": None}


def test_columns_are_named_and_chosen_as_of_any_table():
    rows = [{"caption": "a dog", "licence": "CC0", "id": 7, "x": 1}]
    table = open_table(
        job_of(rows=rows, columns={"prompt": "caption", "id": "id"}, keep=["licence"]).prompts
    )
    assert table.extras.names == ["licence"]
    with pytest.raises(PromptTableError, match=r"no column 'prompt'\. It has: caption, licence"):
        open_table(job_of(rows=rows).prompts)


def test_other_rows_are_another_job():
    libraries = plan.versions()
    one, other = (job_of(rows=[{"prompt": prompt}]) for prompt in ("a dog", "a cat"))
    assert plan.fingerprint(one, libraries) != plan.fingerprint(other, libraries)


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ({}, "prompts.path = nothing: must be given, or rows in its place"),
        ({"path": "a.csv", "rows": ROWS}, "prompts.rows = rows beside path: a job has one table"),
        ({"rows": []}, r"prompts.rows = \[\]: must be not empty"),
        ({"rows": ["a dog"]}, "prompts.rows.0 = 'a dog': must be a section of keys"),
        ({"rows": {"prompt": "a dog"}}, "prompts.rows = .*: must be a list"),
    ],
)
def test_what_is_no_table_is_refused(prompts, words):
    with pytest.raises(JobError, match=words):
        job_of(**prompts)


def test_a_prompt_that_is_no_text_is_refused():
    with pytest.raises(PromptTableError, match="column 'prompt' = int64: must hold text"):
        open_table(job_of(rows=[{"prompt": 3}]).prompts)

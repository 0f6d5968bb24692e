"""A prompt table whose rows are in the job file."""

import pytest

from sdbatch.errors import JobError, PromptTableError
from sdbatch.job import parse
from sdbatch.output import identity, plan
from sdbatch.prompts.table import open_table, read_rows

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
    rows = read_rows(source, 0, 2, table.schema).to_pylist()
    assert rows[0] == {
        "prompt": 'a red dog: "big"\nand ü',
        "seed": 2**53 + 1,
        "guidance_scale": 3,
        "tags": ["a"],
    }
    assert rows[1] == {"prompt": "", "seed": None, "guidance_scale": None, "tags": None}


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
    ],
)
def test_invalid_prompts_sections_are_rejected(prompts, words):
    with pytest.raises(JobError, match=words):
        job_of(**prompts)


def test_a_prompt_that_is_not_text_is_rejected():
    with pytest.raises(PromptTableError, match="column 'prompt' = int64: must hold text"):
        open_table(job_of(rows=[{"prompt": 3}]).prompts)

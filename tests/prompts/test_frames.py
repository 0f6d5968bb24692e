"""Sequences: prompts.frames makes each copy of a row images whose mix goes from 0 to 1."""

import pytest

from sdbatch.errors import JobError, PromptTableError
from sdbatch.prompts.table import open_table
from tests.finished import read_stage, small_job


def read(job):
    plan, stage, blocks = read_stage(job)
    return plan, [row for block in blocks for row in stage(block).to_pylist()]


@pytest.mark.parametrize("size", [1, 4, 5, 12])
def test_each_copy_of_a_row_is_a_sequence_with_one_seed(make_job, tmp_path, size):
    prompts = {"frames": 3, "images_per_row": 2}
    output = {"images_per_shard": size}
    job = small_job(make_job, tmp_path, ("a", "b"), prompts=prompts, output=output)
    plan, rows = read(job)

    assert plan.images == len(rows) == 12
    assert [row["row_key"] for row in rows] == ["0"] * 6 + ["1"] * 6
    assert [row["sample_index"] for row in rows] == [*range(6)] * 2
    assert [row["mix"] for row in rows] == [0, 0.5, 1] * 4
    first = rows[0]["seed"]
    assert [row["seed"] - first for row in rows[:6]] == [0, 0, 0, 1, 1, 1]


def test_a_job_or_a_table_that_sets_mix_has_no_frames(make_job, write):
    with pytest.raises(JobError, match=r"sampling\.mix = 0\.5: must be left out, as prompts\.fra"):
        make_job(prompts={"frames": 2}, sampling={"mix": 0.5})
    path = write("t.csv", "prompt,mix\na,0.5\n")
    with pytest.raises(PromptTableError, match=r"column 'mix' = .*prompts\.frames.*mix=null"):
        open_table(make_job(prompts={"frames": 2, "path": path}).prompts)


@pytest.mark.parametrize("frames", [1, 0, -2])
def test_a_sequence_has_two_images_or_more(make_job, frames):
    with pytest.raises(JobError, match=r"prompts\.frames = .*must be greater than or equal to 2"):
        make_job(prompts={"frames": frames})

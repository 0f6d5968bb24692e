"""What `sdbatch plan` shows of a job's memory."""

import pytest

from sdbatch.output.plan import AIM_BYTES, make_plan
from sdbatch.output.record import write_record
from sdbatch.prompts.table import open_table
from sdbatch.report.outline import make_outline
from sdbatch.storage import Store


@pytest.fixture
def table(tmp_path):
    """A table in which one of 100 rows is larger than the others."""
    path = tmp_path / "table"
    path.mkdir()
    rows = "".join(f"a dog, number {i},{2048 if i == 50 else ''}\n" for i in range(99))
    (path / "a.csv").write_text(f"prompt,number,height\n{rows}")
    return path


def test_the_memory_of_a_shard_is_that_of_its_largest_images(table, make_job):
    job = make_job(prompts={"path": str(table), "images_per_row": 64}, sampling={"width": 2048})
    outline = make_outline(job)
    assert outline.images_per_shard == 53
    most = 2.2 * AIM_BYTES / 2**20
    assert outline.memory == (
        "up to 560 MiB for a shard, if it is 53 images of 2048x2048 pixels of pure noise"
    )
    assert 0.98 * most < 560 <= most
    assert f"memory     {outline.memory}\n" in outline.text()


def test_a_number_of_images_that_takes_more_memory_comes_with_the_way_out(table, make_job):
    output = {"images_per_shard": 99}
    job = make_job(
        prompts={"path": str(table), "images_per_row": 64}, sampling={"width": 2048}, output=output
    )
    assert make_outline(job).memory == (
        "up to 1.0 GiB for a shard, if it is 99 images of 2048x2048 pixels of pure noise. Set "
        "output.images_per_shard to 53 in a new output, or put the largest images into a job of "
        "their own"
    )


def test_larger_rows_that_are_appended_keep_the_shards_and_come_with_the_way_out(
    table, make_job, tmp_path
):
    store = Store(str(tmp_path / "out"))
    store.begin()
    job = make_job(prompts={"path": str(table), "images_per_row": 64}, sampling={"width": 2048})
    plan = make_plan(job, open_table(job.prompts), None)
    write_record(store, plan.job, plan.shards, plan.table.extras)
    rows = "".join(f"a cat,{i},4096\n" for i in range(60))
    (table / "b.csv").write_text(f"prompt,number,height\n{rows}")
    outline = make_outline(job)
    assert outline.images_per_shard == 53
    assert outline.memory.startswith("up to 1.1 GiB for a shard, if it is 53 images of 2048x4096")
    assert "Set output.images_per_shard to 26 in a new output" in outline.memory

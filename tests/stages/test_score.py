"""The score stage: what the judge reads becomes columns of the dataset itself."""

import pyarrow as pa
import pyarrow.dataset as ds
import pytest

from sdbatch import registry
from sdbatch.errors import JobError, PromptTableError
from sdbatch.output.verify import verify_output
from sdbatch.report.scores import read_scores, score_output
from sdbatch.shapes import picture, scorer
from sdbatch.stages.base import added_columns
from tests.fakes import Painter
from tests.finished import finish, small_job

RED = "a red circle on a white background"
PICTURE = picture.paint("white", "plain", [])
PROMPTS = [RED, "a dog", "fail", RED]
STAGES = [{"score": "shapes"}]


@pytest.mark.parametrize("file_format", ["parquet", "webdataset"])
def test_scores_are_columns_of_the_dataset_and_those_of_the_command(
    make_job, tmp_path, file_format
):
    job = small_job(make_job, tmp_path, PROMPTS, stages=STAGES, output={"format": file_format})
    output = finish(job, lambda: Painter({RED: PICTURE}))
    assert list(verify_output(output.store)) == []
    assert (output.report.images, output.report.failed) == (3, 1)

    from sdbatch.output.reader import open_images

    rows = list(open_images(output.store).rows())
    score_output(output.store)
    by_command = read_scores(output.store)
    names = [field.name for field in scorer.COLUMNS]
    for row in rows:
        assert [row[name] for name in names] == [by_command[row["sha256"]][name] for name in names]
    assert [row["prompt"] for row in rows] == [RED, "a dog", RED]
    assert rows[1]["fidelity"] is None
    assert 0 <= rows[0]["fidelity"] < 1  # the picture has no circle
    assert rows[0]["fidelity_background"] is True


def test_scores_have_their_types_and_failed_rows_have_none(make_job, tmp_path):
    job = small_job(make_job, tmp_path, PROMPTS, stages=STAGES)
    output = finish(job, lambda: Painter({RED: PICTURE}))
    data = ds.dataset(output.folder / "data").schema
    assert [data.field(field.name) for field in scorer.COLUMNS] == list(scorer.COLUMNS)
    assert data.names[-len(scorer.COLUMNS) :] == [field.name for field in scorer.COLUMNS]
    failed = ds.dataset(output.folder / "failed").to_table()
    assert failed["fidelity"].to_pylist() == [None]


def test_a_job_without_stages_adds_no_column(make_job):
    assert added_columns(make_job()) == pa.schema([])
    assert added_columns(make_job(stages=STAGES)) == pa.schema(scorer.COLUMNS)


def test_a_column_of_the_table_with_the_name_of_a_score_is_an_error(make_job, tmp_path):
    table = pa.table({"prompt": [RED], "fidelity": [0.5]})
    finish(small_job(make_job, tmp_path, table))
    with pytest.raises(PromptTableError, match=r"^column 'fidelity' .*prompts.keep="):
        finish(small_job(make_job, tmp_path, table, stages=STAGES))


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ([{"score": "beauty"}], "score = 'beauty': must be 'shapes'"),
        ([{"scores": "shapes"}], "unknown key. Did you mean 'stages.0.score'"),
        ([{}], "must be one of draw, score with its value"),
        ({"score": "shapes"}, "stages = .*: must be a list"),
        (["score"], "must be a section of keys"),
        ([*STAGES, *STAGES], "stages.1 = .*: must not repeat an earlier stage"),
    ],
)
def test_a_stage_that_does_not_exist_is_an_error(make_job, stages, words):
    with pytest.raises(JobError, match=words):
        make_job(stages=stages)


def test_a_row_whose_scoring_fails_is_a_failed_row_and_no_others(make_job, tmp_path, monkeypatch):
    monkeypatch.setitem(registry.SCORERS, "shapes", "tests.stages.faulty_scorer")
    output = finish(small_job(make_job, tmp_path, ["a dog", RED, "a cat"], stages=STAGES))
    reason = "score shapes: ZeroDivisionError: no pixels"
    assert (output.report.images, output.report.reasons) == (2, {reason: 1})


def test_two_stages_that_add_the_same_column_are_an_error(make_job, monkeypatch):
    monkeypatch.setattr(scorer, "COLUMNS", (pa.field("sha256", pa.string()),))
    with pytest.raises(JobError, match="must add each column once, and 'sha256' appears twice"):
        added_columns(make_job(stages=STAGES))

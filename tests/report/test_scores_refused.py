"""What cannot be scored, and scores that cannot be read: refused in one line, nothing written."""

import io
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sdbatch.errors import StorageError
from sdbatch.output.reader import open_images
from sdbatch.report import scores, where
from sdbatch.report.scores import SCORES, SCORES_FILE
from sdbatch.shapes import judge
from sdbatch.storage import Store
from tests.finished import PROMPTS, finish, small_job


def test_an_output_that_cannot_be_written_is_told_before_anything_is_judged(
    make_job, tmp_path, monkeypatch
):
    output = finish(small_job(make_job, tmp_path))
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    monkeypatch.setattr(judge, "judge", None)
    with pytest.raises(StorageError, match="must be writable"):
        scores.score(output.store)


def test_score_of_no_output_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(StorageError, match=r"no job\.yaml: must be the output of a job"):
        scores.score(Store(str(tmp_path / "nothing")))
    assert list(tmp_path.iterdir()) == []


def test_score_of_an_output_without_an_image_is_refused(make_job, tmp_path):
    output = finish(small_job(make_job, tmp_path, ["fail", "fail"]))
    with pytest.raises(StorageError, match="no image yet"):
        scores.score(output.store)
    assert SCORES_FILE not in output.store.names()


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["here", "in other processes"])
def test_score_names_the_file_that_is_damaged_and_writes_nothing(prompts, make_job, tmp_path):
    output = finish(small_job(make_job, tmp_path, prompts))
    output.store.put("data/000000.parquet", b"PAR1 and no more PAR1")
    with pytest.raises(StorageError, match=r"data/000000\.parquet = cannot be read .*verify"):
        scores.score(output.store)
    assert SCORES_FILE not in output.store.names()


def foreign(**columns):
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no table",
        b"PAR1 and no more PAR1",
        foreign(key=["a"], aesthetic=[0.5]),
        foreign(**{name: ["text"] for name in SCORES.names}),
        foreign(**{name: [[1]] for name in SCORES.names}),
    ],
    ids=["empty", "text", "cut", "other columns", "other types", "lists"],
)
def test_scores_that_are_broken_are_refused_with_the_way_out(data, make_job, tmp_path):
    output = finish(small_job(make_job, tmp_path, ["a red circle"]))
    output.store.put(SCORES_FILE, data)
    with pytest.raises(StorageError) as raised:
        where.choose(open_images(output.store), 1, None, [where.condition("fidelity<1")])
    assert f"{output.store.url}/scores.parquet = no scores (" in str(raised.value)
    assert f"Run `sdbatch score {output.store.url}` again" in str(raised.value)
    assert "\n" not in str(raised.value)

    scores.score(output.store)
    assert len(scores.read(output.store)) == 1

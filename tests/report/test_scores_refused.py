"""Outputs that cannot be scored, and damaged scores: an error in one line, nothing written."""

import io
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sdbatch.errors import StorageError
from sdbatch.output import names
from sdbatch.output.reader import open_images
from sdbatch.report.scores import SCHEMA, read_scores, score_output
from sdbatch.report.where import choose_rows, parse_condition
from sdbatch.shapes import judge
from sdbatch.storage import Store
from tests.finished import PROMPTS, finish, small_job


def test_score_checks_that_the_output_is_writable_before_it_scores_an_image(
    make_job, tmp_path, monkeypatch
):
    output = finish(small_job(make_job, tmp_path))
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    monkeypatch.setattr(judge, "judge_picture", None)
    with pytest.raises(StorageError, match="must be writable"):
        score_output(output.store)


def test_score_raises_and_writes_nothing_when_there_is_no_output(tmp_path):
    with pytest.raises(StorageError, match=r"no job\.yaml: must be the output of a job"):
        score_output(Store(str(tmp_path / "nothing")))
    assert list(tmp_path.iterdir()) == []


def test_score_raises_when_the_output_has_no_image(make_job, tmp_path):
    output = finish(small_job(make_job, tmp_path, ["fail", "fail"]))
    with pytest.raises(StorageError, match="has no image yet"):
        score_output(output.store)
    assert names.SCORES not in output.store.names()


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["one process", "many processes"])
def test_score_names_the_file_that_is_damaged_and_writes_nothing(prompts, make_job, tmp_path):
    output = finish(small_job(make_job, tmp_path, prompts))
    output.store.put("data/000000.parquet", b"PAR1 and no more PAR1")
    with pytest.raises(StorageError, match=r"data/000000\.parquet: cannot be read .*verify"):
        score_output(output.store)
    assert names.SCORES not in output.store.names()


def parquet_bytes(**columns):
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no table",
        b"PAR1 and no more PAR1",
        parquet_bytes(key=["a"], aesthetic=[0.5]),
        parquet_bytes(**{name: ["text"] for name in SCHEMA.names}),
        parquet_bytes(**{name: [[1]] for name in SCHEMA.names}),
    ],
    ids=["empty", "text", "cut", "other columns", "other types", "lists"],
)
def test_damaged_scores_raise_an_error_with_the_way_out(data, make_job, tmp_path):
    output = finish(small_job(make_job, tmp_path, ["a red circle"]))
    output.store.put(names.SCORES, data)
    with pytest.raises(StorageError) as raised:
        choose_rows(open_images(output.store), 1, None, [parse_condition("fidelity<1")])
    assert str(raised.value).startswith(f"{output.store.url}/scores.parquet = ")
    assert ": must be as `sdbatch score` wrote it" in str(raised.value)
    assert f"Run `sdbatch score {output.store.url}` again" in str(raised.value)
    assert "\n" not in str(raised.value)

    score_output(output.store)
    assert len(read_scores(output.store)) == 1

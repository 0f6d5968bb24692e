"""Outputs that lost files or hold garbage, without Ray: the same command mends them."""

import hashlib
import json
import shutil

import pytest

from sdbatch.output.verify import verify_output
from sdbatch.storage import Store
from tests.without_ray import draw


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def put(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def remove(name):
    return lambda folder: (folder / name).unlink()


def without_files(folder):
    path = folder / "receipts" / "000001.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "files": []}))


DAMAGE = {
    "no plan": (remove("plan.parquet"), 0),
    "a plan of garbage": (put("plan.parquet", b"PAR1 and no more PAR1"), 0),
    "an empty plan": (put("plan.parquet", b""), 0),
    "a receipt of garbage": (put("receipts/000001.json", b"\xff{"), 1),
    "an empty receipt": (put("receipts/000001.json", b""), 1),
    "a receipt without files": (without_files, 1),
    "no manifest": (remove("manifest.parquet"), 0),
    "no data": (remove("data/000001.parquet"), 1),
    "a heartbeat of garbage": (put("progress.json", b"{"), 0),
    "a run of garbage": (put("runs/000002.json", b"{"), 0),
    "no runs": (lambda folder: shutil.rmtree(folder / "runs"), 0),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_same_command_mends_an_output_that_lost(damage, singles, tmp_path):
    job, folder = singles("dog", "cat", "fail"), tmp_path / "out"
    draw(job)
    before, plan = hashes(folder / "data"), (folder / "plan.parquet").read_bytes()
    inflict, again = DAMAGE[damage]
    inflict(folder)
    report = draw(job)
    assert (report.stopped, report.images, report.failed) == (None, 2, 1)
    assert report.drawn_now == again
    assert hashes(folder / "data") == before
    assert (folder / "plan.parquet").read_bytes() == plan
    assert list(verify_output(Store(str(folder)))) == []
    assert len(hashes(folder / "receipts")) == 3


@pytest.mark.parametrize("damage", ["no plan", "a plan of garbage"])
def test_a_lost_plan_is_written_again_when_shards_are_left_to_draw(damage, singles, tmp_path):
    job, folder = singles("dog", "cat", "cow"), tmp_path / "out"
    draw(job)
    before = hashes(folder / "data")
    DAMAGE[damage][0](folder)
    (folder / "receipts" / "000002.json").unlink()
    report = draw(job)
    assert (report.stopped, report.images, report.drawn_now) == (None, 3, 1)
    assert hashes(folder / "data") == before
    assert list(verify_output(Store(str(folder)))) == []

"""The pipeline and its driver, without Ray: what is drawn, kept, drawn again and rejected."""

import hashlib
import json
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import pyarrow.dataset as ds
import pytest
import torch

from sdbatch.batch import driver, pipeline
from sdbatch.engine.engine import Engine
from sdbatch.errors import JobError, StorageError
from sdbatch.job import Model, Safety
from sdbatch.models import sd1
from sdbatch.models.build import Build
from sdbatch.models.find_model import find_model
from sdbatch.output.record import read_record
from sdbatch.output.verify import verify_output
from sdbatch.report.progress import SilentDisplay
from sdbatch.storage import Store
from tests.engine.faulty_family import FaultyFamily
from tests.fakes import FakeEngine
from tests.without_ray import draw


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("*"))}


def test_two_clean_runs_give_identical_data(make_job, tmp_path):
    for name in ("one", "two"):
        draw(make_job(output={"path": str(tmp_path / name)}))
    assert hashes(tmp_path / "one" / "data") == hashes(tmp_path / "two" / "data") != {}


def test_a_finished_output_is_not_drawn_again(make_job, tmp_path):
    draw(make_job())
    before = hashes(tmp_path / "out" / "receipts")
    ready = pipeline.prepare(make_job())
    report = pipeline.draw(ready, display=SilentDisplay())  # no engine is needed, and no Ray
    assert (report.drawn_now, report.images) == (0, 6)
    assert hashes(tmp_path / "out" / "receipts") == before


def test_appended_files_become_new_shards(make_job, prompts, tmp_path):
    prompts("dog", "cat", name="table/b.txt")
    job = make_job(prompts={"path": str(tmp_path / "table")})
    draw(job)
    before = hashes(tmp_path / "out" / "data")
    prompts("cow", name="table/a.txt")
    report = draw(job)
    after = hashes(tmp_path / "out" / "data")
    assert (report.images, report.drawn_now) == (3, 1)
    assert before.items() <= after.items()


def test_a_job_that_changed_is_refused_and_overwrite_starts_anew(make_job, tmp_path):
    draw(make_job())
    changed = make_job(sampling={"guidance_scale": 3.0})
    with pytest.raises(
        JobError, match=r"sampling.guidance_scale = 3.0: must be 7.5, as in.*--overwrite"
    ):
        draw(changed)
    report = draw(changed, overwrite=True)
    assert report.drawn_now == 6
    assert read_record(Store(str(tmp_path / "out"))).job.sampling.guidance_scale == 3.0


class Tolerant(FakeEngine):
    """Draws what FakeEngine fails."""

    def submit(self, request):
        return super().submit(request.updated(prompt="anything"))


def test_retry_failed_draws_the_shards_with_failed_rows_again(make_job, prompts, tmp_path):
    job = make_job(
        prompts={"path": prompts("dog", "fail", "cat", "cow")}, output={"images_per_shard": 2}
    )
    first = draw(job)
    assert (first.images, first.failed) == (3, 1)
    report = draw(job, make_engine=Tolerant, retry_failed=True)
    assert (report.images, report.failed, report.drawn_now) == (4, 0, 2)
    assert list((tmp_path / "out" / "failed").glob("*")) == []
    assert list(verify_output(Store(str(tmp_path / "out")))) == []


def test_max_failed_stops_the_run_and_says_so(make_job, prompts):
    job = make_job(prompts={"path": prompts(*["fail"] * 30)}, output={"images_per_shard": 5})
    report = draw(job, make_engine=partial(FakeEngine, delay=0.05), max_failed=3)
    assert "more than --max-failed 3" in report.stopped
    assert report.exit_code == 1


class Stuck(FakeEngine):
    """Never draws."""

    def submit(self, request):
        return Future()


def test_a_run_in_which_nothing_moves_ends(make_job, monkeypatch):
    monkeypatch.setattr(driver, "STALL_SECONDS", 1.0)
    report = draw(make_job(), make_engine=Stuck)
    assert "no progress for" in report.stopped


def test_an_output_folder_that_is_not_ours_is_left_alone(make_job, tmp_path):
    (tmp_path / "out" / "data").mkdir(parents=True)
    (tmp_path / "out" / "data" / "mine.parquet").write_text("precious")
    with pytest.raises(StorageError, match=r"holds data/ but no job.yaml"):
        pipeline.prepare(make_job(), overwrite=True)
    assert (tmp_path / "out" / "data" / "mine.parquet").read_text() == "precious"


def small_device():
    """Return an engine on a device that holds 4 lanes, and finds it out after 6 ticks."""
    files = find_model(Model(path="builtin:shapes"), Safety(checker="none"))
    family = FaultyFamily(sd1.load(files, Build("cpu", "float32")))
    engine = Engine(family, lanes=8, threads=1)

    def hold_four(latents, *_):
        if len(latents) > 4 and engine.usage.ticks >= 6:
            raise torch.OutOfMemoryError("tried to allocate 20 GiB")

    family.on_denoise = hold_four
    return engine


def test_a_run_goes_on_in_fewer_lanes_and_says_so(make_job, prompts, tmp_path):
    job = make_job(
        prompts={"path": prompts(*(f"dog {i}" for i in range(12)))},
        sampling={"num_inference_steps": 4},
        output={"images_per_shard": 6},
    )
    report = draw(job, make_engine=small_device)
    assert (report.images, report.failed, report.stopped) == (12, 0, None)
    assert ds.dataset(tmp_path / "out" / "data").count_rows() == 12
    assert report.engines.lanes == {"8": 4, "4": 8}
    assert "reduced to 4 lanes (OutOfMemoryError: tried to allocate 20 GiB)" in report.text()
    receipts = [json.loads(p.read_text()) for p in (tmp_path / "out" / "receipts").iterdir()]
    assert sum(receipt["facts"]["lanes"].get("4", 0) for receipt in receipts) == 8

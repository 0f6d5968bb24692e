"""The data flow on a real Ray: nothing lost, shards shared out, faults where they belong."""

import hashlib
from collections import Counter
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import pyarrow.dataset as ds
import pytest

import sdbatch
from sdbatch.batch import driver, pipeline
from sdbatch.errors import JobError, ModelError
from sdbatch.output import receipts
from sdbatch.output.record import read_record
from sdbatch.output.verify import verify_output
from sdbatch.storage import Store
from tests.fakes import FakeEngine


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("*"))}


def images_by_row(output: Path) -> dict[tuple[str, int], str]:
    table = ds.dataset(output / "data").to_table(columns=["row_key", "sample_index", "sha256"])
    return {(r["row_key"], r["sample_index"]): r["sha256"] for r in table.to_pylist()}


def read_receipts(output: Path):
    store = Store(str(output))
    return receipts.read_receipts(store, receipts.committed_shards(store))


class Recorder:
    """A display that keeps what it was shown."""

    def __init__(self):
        self.seen, self.report = [], None

    def show(self, progress):
        self.seen.append(progress)

    def close(self, report):
        self.report = report


def test_every_row_is_accounted_for_once(draw, make_job, prompts, tmp_path):
    table = prompts(*(f"dog {i}" for i in range(20)), "fail", *(f"cat {i}" for i in range(19)))
    job = make_job(prompts={"path": table, "images_per_row": 2}, output={"images_per_shard": 16})
    display = Recorder()
    report = draw(job, display=display)
    assert (report.images, report.failed, report.planned) == (78, 2, 80)
    assert report.reasons == {"ValueError: this prompt cannot be drawn": 2}
    assert report.exit_code == 3
    assert list(verify_output(Store(str(tmp_path / "out")))) == []
    keys = ds.dataset(tmp_path / "out" / "data").to_table(columns=["key"])["key"].to_pylist()
    lost = ds.dataset(tmp_path / "out" / "failed").to_table(columns=["key"])["key"].to_pylist()
    assert len(set(keys + lost)) == len(keys + lost) == 80
    assert display.report == report
    assert display.seen[-1].done == 80


def test_two_clean_runs_give_identical_data(draw, make_job, tmp_path):
    jobs = [make_job(output={"path": str(tmp_path / name)}) for name in ("one", "two")]
    for job in jobs:
        draw(job)
    assert hashes(tmp_path / "one" / "data") == hashes(tmp_path / "two" / "data") != {}


def test_four_shards_on_two_actors_are_drawn_two_and_two(draw, make_job, prompts, tmp_path):
    job = make_job(
        prompts={"path": prompts(*(f"dog {i}" for i in range(8)))},
        output={"images_per_shard": 2},
        cluster={"actors": 2},
    )
    draw(job, make_engine=partial(FakeEngine, delay=0.2))
    actors = Counter(receipt.facts["pid"] for receipt in read_receipts(tmp_path / "out"))
    assert sorted(actors.values()) == [2, 2]


def test_progress_moves_within_a_shard(draw, make_job, prompts):
    job = make_job(prompts={"path": prompts(*(f"dog {i}" for i in range(12)))})
    display = Recorder()
    draw(job, make_engine=partial(FakeEngine, delay=0.3), display=display)
    assert {progress.done for progress in display.seen} - {0, 12}


def test_a_finished_output_is_not_drawn_again(draw, make_job, tmp_path):
    draw(make_job())
    before = hashes(tmp_path / "out" / "receipts")
    report = draw(make_job(), make_engine=None)  # no engine is needed, and no Ray
    assert (report.drawn_now, report.images) == (0, 6)
    assert hashes(tmp_path / "out" / "receipts") == before


def test_appended_files_become_new_shards(draw, make_job, prompts, tmp_path):
    prompts("dog", "cat", name="table/b.txt")
    job = make_job(prompts={"path": str(tmp_path / "table")})
    draw(job)
    before = hashes(tmp_path / "out" / "data")
    prompts("cow", name="table/a.txt")
    report = draw(job)
    after = hashes(tmp_path / "out" / "data")
    assert (report.images, report.drawn_now) == (3, 1)
    assert before.items() <= after.items()


def test_a_job_that_changed_is_refused_and_overwrite_starts_anew(draw, make_job, tmp_path):
    draw(make_job())
    changed = make_job(sampling={"guidance_scale": 3.0})
    with pytest.raises(
        JobError, match=r"sampling.guidance_scale = 3.0: must be 7.5, as in.*--overwrite"
    ):
        draw(changed)
    report = draw(changed, overwrite=True)
    assert report.drawn_now == 6
    assert read_record(Store(str(tmp_path / "out"))).job.sampling.guidance_scale == 3.0


def test_a_shard_that_kills_its_actor_three_times_is_recorded_and_the_job_goes_on(
    draw, make_job, prompts, tmp_path
):
    table = prompts(*(f"dog {i}" for i in range(4)), "die", *(f"cat {i}" for i in range(11)))
    job = make_job(prompts={"path": table}, output={"images_per_shard": 4}, cluster={"actors": 1})
    report = draw(job, make_engine=partial(FakeEngine, delay=0.05))
    assert (report.images, report.failed) == (12, 4)
    assert report.reasons == {"Drawing this shard killed the actor 3 times.": 4}
    again = draw(job, retry_failed=True)  # still deadly: the same end
    assert (again.images, again.failed, again.drawn_now) == (12, 4, 0)


def test_retry_failed_draws_the_shards_with_failed_rows_again(draw, make_job, prompts, tmp_path):
    job = make_job(
        prompts={"path": prompts("dog", "fail", "cat", "cow")}, output={"images_per_shard": 2}
    )
    first = draw(job)
    assert (first.images, first.failed) == (3, 1)
    report = draw(job, make_engine=Tolerant, retry_failed=True)
    assert (report.images, report.failed, report.drawn_now) == (4, 0, 2)
    assert list((tmp_path / "out" / "failed").glob("*")) == []
    assert list(verify_output(Store(str(tmp_path / "out")))) == []


class Tolerant(FakeEngine):
    """Draws what FakeEngine fails."""

    def submit(self, request):
        return super().submit(request.updated(prompt="anything"))


def test_max_failed_stops_the_run_and_says_so(draw, make_job, prompts):
    job = make_job(prompts={"path": prompts(*["fail"] * 30)}, output={"images_per_shard": 5})
    report = draw(job, make_engine=partial(FakeEngine, delay=0.05), max_failed=3)
    assert "more than --max-failed 3" in report.stopped
    assert report.exit_code == 1


class Stuck(FakeEngine):
    """Never draws."""

    def __init__(self):
        super().__init__()
        self.waiting = []

    def submit(self, request):
        self.waiting.append(Future())
        return self.waiting[-1]


def test_a_run_in_which_nothing_moves_ends(draw, make_job, monkeypatch):
    monkeypatch.setattr(driver, "STALL_SECONDS", 3.0)
    report = draw(make_job(), make_engine=Stuck)
    assert "no progress for" in report.stopped


def cannot_load():
    raise ModelError("model.path = 'x': cannot be loaded")


def test_a_model_that_cannot_be_loaded_leaves_nothing_behind(draw, make_job, tmp_path):
    with pytest.raises(ModelError, match=r"^model.path = 'x': cannot be loaded$"):
        draw(make_job(), make_engine=cannot_load)
    assert not (tmp_path / "out").exists()


def loads_once(marker):
    """The first actor draws and dies of a shard; none that comes after it can load."""
    if Path(marker).exists():
        raise ModelError("model.path = 'x': gone")
    Path(marker).touch()
    return FakeEngine(delay=0.05)


def test_a_model_that_cannot_be_loaded_any_more_keeps_what_was_drawn(
    draw, make_job, prompts, tmp_path
):
    job = make_job(
        prompts={"path": prompts(*(f"dog {i}" for i in range(30)), "die")},
        output={"images_per_shard": 2},
        cluster={"actors": 1},
    )
    report = draw(job, make_engine=partial(loads_once, str(tmp_path / "marker")))
    assert report.stopped == "model.path = 'x': gone"
    assert report.exit_code == 1
    assert report.images > 0
    store = Store(str(tmp_path / "out"))
    assert len(receipts.committed_shards(store)) * 2 == report.images
    assert draw(job, make_engine=Tolerant).exit_code == 0


def dies_while_loading():
    import os

    os._exit(1)


def test_a_model_whose_loading_kills_its_actors_ends_the_run(draw, make_job, tmp_path):
    with pytest.raises(ModelError, match="Loading the model killed"):
        draw(make_job(), make_engine=dies_while_loading)
    assert not (tmp_path / "out").exists()


def in_the_way(path):
    Path(path).write_text("a file where a folder goes")
    return FakeEngine()


def test_an_output_that_cannot_be_written_stops_the_run_and_can_be_resumed(
    draw, make_job, tmp_path
):
    data = tmp_path / "out" / "data"
    report = draw(make_job(), make_engine=partial(in_the_way, str(data)))
    assert "out/data/000000.parquet" in report.stopped
    assert report.exit_code == 1
    data.unlink()
    assert draw(make_job()).exit_code == 0


def test_an_output_folder_that_is_not_ours_is_left_alone(make_job, tmp_path):
    (tmp_path / "out" / "data").mkdir(parents=True)
    (tmp_path / "out" / "data" / "mine.parquet").write_text("precious")
    with pytest.raises(sdbatch.errors.StorageError, match=r"holds data/ but no job.yaml"):
        pipeline.prepare(make_job(), overwrite=True)
    assert (tmp_path / "out" / "data" / "mine.parquet").read_text() == "precious"


def test_image_bytes_do_not_depend_on_actors_or_files(ray_local, make_job, prompts, tmp_path):
    lines = [f"a {colour} dog, number {i}" for i in range(7) for colour in ("red", "blue", "green")]
    one = prompts(*lines, name="one.txt")
    for i in range(7):
        prompts(*lines[3 * i : 3 * i + 3], name=f"seven/{i}.txt")
    runs = {
        "one file, one actor": (one, 1, 32),
        "one file, two actors": (one, 2, 5),
        "seven files, two actors": (str(tmp_path / "seven"), 2, 2),
    }
    found = []
    for name, (table, actors, size) in runs.items():
        job = make_job(
            prompts={"path": table, "images_per_row": 2},
            sampling={"sampler": "euler_a"},
            cluster={"actors": actors},
            output={"path": str(tmp_path / name), "images_per_shard": size},
        )
        assert sdbatch.run(job).images == 42
        found.append(images_by_row(tmp_path / name))
    assert found[0] == found[1] == found[2]
    assert len(set(found[0].values())) == 42

"""The data flow on a real Ray: nothing lost, shards shared out, faults where they belong.

tests/batch/test_pipeline.py has what needs no Ray.
"""

import hashlib
import os
import re
import signal
import sys
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pyarrow.dataset as ds
import pytest
import ray

import sdbatch
from sdbatch.batch import pipeline
from sdbatch.errors import ModelError
from sdbatch.output import receipts
from sdbatch.output.record import read_record
from sdbatch.output.verify import verify_output
from sdbatch.report.progress import SilentDisplay
from sdbatch.storage import Store
from tests import without_ray
from tests.fakes import FakeEngine
from tests.ray import engines
from tests.wait import wait_until


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("*"))}


def images_by_row(output: Path) -> dict[tuple[str, int], str]:
    table = ds.dataset(output / "data").to_table(columns=["row_key", "sample_index", "sha256"])
    return {(r["row_key"], r["sample_index"]): r["sha256"] for r in table.to_pylist()}


class Recorder(SilentDisplay):
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

    again = job.updated(output=job.output.updated(path=str(tmp_path / "again")))
    without_ray.draw(again)
    for folder in ("data", "failed"):
        assert hashes(tmp_path / "again" / folder) == hashes(tmp_path / "out" / folder) != {}


class Telling(Recorder):
    """Tells the engines that some images were shown as drawn."""

    def __init__(self, folder: Path):
        super().__init__()
        self._folder = folder

    def show(self, progress):
        super().show(progress)
        if progress.done:
            (self._folder / "shown").touch()


@pytest.fixture(scope="module")
def shared_out(draw, tmp_path_factory):
    """Draw four shards of two images with two actors, all at once; return output and display."""
    folder = tmp_path_factory.mktemp("shared-out")
    job = sdbatch.job.parse(
        {
            "prompts": {"rows": [{"prompt": f"dog {i}"} for i in range(8)]},
            "model": "builtin:shapes",
            "sampling": {"height": 64, "width": 64},
            "cluster": {"actors": 2},
            "output": {"path": str(folder / "out"), "images_per_shard": 2},
        }
    )
    display = Telling(folder)
    draw(job, make_engine=partial(engines.Together, folder, 8), display=display)
    return folder / "out", display


def test_four_shards_on_two_actors_are_drawn_two_and_two(shared_out):
    store = Store(str(shared_out[0]))
    every = receipts.proved(store, read_record(store).proof())
    actors = Counter(receipt.facts["pid"] for receipt in every)
    assert sorted(actors.values()) == [2, 2]


def test_progress_moves_within_a_shard(shared_out):
    done = {progress.done for progress in shared_out[1].seen}
    assert done & {1, 2}  # the first image of an actor, or of both
    assert max(done) == 8


def test_a_row_that_ends_its_process_fails_alone(draw, make_job, prompts, tmp_path):
    lines = [*(f"dog {i}" for i in range(6)), "die by SIGSEGV", *(f"cat {i}" for i in range(9))]
    job = make_job(
        prompts={"path": prompts(*lines)}, output={"images_per_shard": 4}, cluster={"actors": 1}
    )
    report = draw(job, make_engine=partial(FakeEngine, delay=0.05))
    assert (report.images, report.failed, report.exit_code) == (15, 1, 3)
    assert report.reasons == {"Drawing this row ended its process by signal SIGSEGV.": 1}
    assert list(verify_output(Store(str(tmp_path / "out")))) == []

    alone = job.updated(output=job.output.updated(path=str(tmp_path / "alone")))
    assert without_ray.draw(alone, make_engine=engines.Tolerant).images == 16
    undisturbed = images_by_row(tmp_path / "alone")
    del undisturbed["6", 0]
    assert images_by_row(tmp_path / "out") == undisturbed


@pytest.mark.slow
def test_a_row_that_ended_its_process_is_drawn_when_failed_rows_are_retried(
    draw, make_job, prompts
):
    job = make_job(
        prompts={"path": prompts("dog", "cat", "die", "cow")},
        output={"images_per_shard": 2},
        cluster={"actors": 1},
    )
    assert draw(job).failed == 1
    for engine, images in ((FakeEngine, 3), (engines.Tolerant, 4)):
        ready = pipeline.prepare(job, retry_failed=True)
        again = pipeline.draw(ready, display=SilentDisplay(), make_engine=engine)
        assert (again.images, again.failed) == (images, 4 - images)


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
@pytest.mark.parametrize("kills", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_no_row_fails_when_actors_are_killed_from_outside(draw, make_job, prompts, tmp_path, kills):
    job = make_job(
        prompts={"path": prompts(*(f"dog {i}" for i in range(12 * kills)))},
        output={"images_per_shard": 2},
        cluster={"actors": 1},
    )
    pids = tmp_path / "pids"
    pids.mkdir()

    def kill_actors():
        killed = set()
        for _ in range(kills):
            before = len(list(tmp_path.glob("out/receipts/*")))
            wait_until(lambda: len(list(tmp_path.glob("out/receipts/*"))) > before)  # noqa: B023
            wait_until(lambda: actors() - killed)
            (pid,) = actors() - killed
            os.kill(pid, signal.SIGKILL)
            killed.add(pid)
        return killed

    def actors():
        """Return the processes of actors that have made an engine, not their children's."""
        commands = {int(p.name): Path(f"/proc/{p.name}/cmdline") for p in pids.iterdir()}
        return {
            n for n, path in commands.items() if path.exists() and b"ray::" in path.read_bytes()
        }

    with ThreadPoolExecutor(1) as thread:
        killed = thread.submit(kill_actors)
        report = draw(job, make_engine=partial(engines.Known, pids))
        assert len(killed.result()) == kills
    assert (report.images, report.failed, report.exit_code) == (12 * kills, 0, 0)
    store = Store(str(tmp_path / "out"))
    every = receipts.proved(store, read_record(store).proof())
    isolated = [receipt for receipt in every if "isolated" in receipt.facts]
    assert 0 < len(isolated) < len(every)
    assert sum(receipt.facts["attempt"] - 1 for receipt in every) >= kills

    alone = job.updated(output=job.output.updated(path=str(tmp_path / "alone")))
    without_ray.draw(alone)
    assert hashes(tmp_path / "out" / "data") == hashes(tmp_path / "alone" / "data")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_a_run_stops_when_actors_die_again_and_again_and_no_row_is_the_cause(
    draw, make_job, prompts
):
    job = make_job(
        prompts={"path": prompts("dog", "cat", "cow", "die")},
        output={"images_per_shard": 1},
        cluster={"actors": 1},
    )
    report = draw(job, make_engine=engines.KillsTheActor)
    assert report.stopped.startswith("Shard 000003: 10 drawing actors died during it, but no row")
    assert "run the same command again to resume" in report.stopped
    assert (report.images, report.failed, report.exit_code) == (3, 0, 1)


def test_a_model_that_cannot_be_loaded_leaves_nothing_behind(draw, make_job, tmp_path):
    with pytest.raises(ModelError, match=r"^model.path = 'x': cannot be loaded$"):
        draw(make_job(), make_engine=engines.cannot_load)
    assert not (tmp_path / "out").exists()


def test_a_model_that_cannot_be_loaded_any_more_keeps_what_was_drawn(
    draw, make_job, prompts, tmp_path
):
    job = make_job(
        prompts={"path": prompts(*(f"dog {i}" for i in range(30)), "die")},
        output={"images_per_shard": 2},
        cluster={"actors": 1},
    )
    report = draw(job, make_engine=partial(engines.loads_once, tmp_path / "marker"))
    assert report.stopped == "model.path = 'x': gone"
    assert report.exit_code == 1
    assert report.images > 0
    store = Store(str(tmp_path / "out"))
    assert len(receipts.committed_shards(store)) * 2 == report.images
    assert without_ray.draw(job, make_engine=engines.Tolerant).exit_code == 0


def test_a_model_whose_loading_kills_its_actors_ends_the_run(draw, make_job, tmp_path):
    with pytest.raises(ModelError, match="Loading the model killed"):
        draw(make_job(), make_engine=engines.dies_while_loading)
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_written_stops_the_run_and_can_be_resumed(
    draw, make_job, tmp_path
):
    data = tmp_path / "out" / "data"
    report = draw(make_job(), make_engine=partial(engines.in_the_way, data))
    assert re.match(r"\S+/out/data/000000\.parquet = .* same command again\.$", report.stopped)
    assert report.exit_code == 1
    data.unlink()
    assert without_ray.draw(make_job()).exit_code == 0


def test_image_bytes_do_not_depend_on_actors_or_files(ray_local, make_job, prompts, tmp_path):
    lines = [f"a {colour} dog, number {i}" for i in range(7) for colour in ("red", "blue", "green")]
    one = prompts(*lines, name="one.txt")
    for i in range(7):
        prompts(*lines[3 * i : 3 * i + 3], name=f"seven/{i}.txt")

    def job(name, table, actors, size):
        return make_job(
            prompts={"path": table, "images_per_row": 2},
            sampling={"sampler": "euler_a"},
            cluster={"actors": actors},
            output={"path": str(tmp_path / name), "images_per_shard": size},
        )

    with without_ray.without_ray():
        assert sdbatch.run(job("one file, one actor", one, 1, 32)).images == 42
    assert sdbatch.run(job("one file, two actors", one, 2, 5)).images == 42
    with without_ray.without_ray():
        assert sdbatch.run(job("seven files", str(tmp_path / "seven"), 1, 2)).images == 42
    names = ("one file, one actor", "one file, two actors", "seven files")
    first, second, third = (images_by_row(tmp_path / name) for name in names)
    assert first == second == third
    assert len(set(first.values())) == 42


def scrape():
    """Return the metrics that Prometheus finds on the node: name -> tags -> value."""
    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=10) as answer:
        text = answer.read().decode()
    found = {}
    for name, tags, value in re.findall(r"^ray_sdbatch_(\w+)\{(.*)\} (\S+)$", text, re.M):
        values = dict(re.findall(r'(\w+)="([^"]*)"', tags))
        if values["dataset"] == "counted":
            kind = values.get("outcome") or values.get("stage")
            key = name, kind
            found[key] = found.get(key, 0) + float(value) * ("bucket" not in name)
    return found


def test_prometheus_finds_what_a_run_did_and_logs_tell_of_each_shard(draw, make_job, prompts):
    table = prompts(*["a dog"] * 9, "fail")
    job = make_job(
        name="counted", prompts={"path": table}, output={"images_per_shard": 2},
        cluster={"actors": 1},
    )  # fmt: skip
    report = draw(job, make_engine=engines.Working)
    assert (report.images, report.failed) == (9, 1)
    wait_until(lambda: scrape().get(("stage_seconds_count", "write")) == 5)
    found = scrape()
    assert found["images_total", "drawn"] == 9
    assert found["images_total", "failed"] == 1
    assert found["ticks_total", None] == 10
    assert found["engine_seconds_total", None] == 5.0
    assert found["engine_idle_seconds_total", None] == 1.25
    assert (found["lanes_total", None], found["lanes_filled_total", None]) == (40, 30)
    assert found["queue", None] == 0
    assert found["images_planned", None] == 10
    assert {found["stage_seconds_count", stage] for stage in ("read", "draw", "write")} == {5}

    logs = Path(ray.worker.global_worker.node.get_session_dir_path()) / "logs"
    text = "".join(file.read_text() for file in logs.glob("worker-*.err"))
    for stage in ("read", "draw", "write"):
        assert re.search(rf"shard 000003 {stage}: begun", text)
        assert re.search(rf"shard 000003 {stage}: ended after \d+\.\d\d s", text)

"""Drawing actors that Ray does not start again, or that live and do nothing."""

import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import ray

from sdbatch.batch import pipeline, stall
from sdbatch.report.progress import SilentDisplay
from tests import without_ray
from tests.fakes import FakeEngine
from tests.ray import engines
from tests.wait import wait_until

TABLES = ("a.txt", "b.txt")


@pytest.fixture
def tables():
    """Serve two tables; yield their URLs, and what lets the second one be read while it is set."""
    may_read = threading.Event()
    may_read.set()

    class Tables(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self):
            self._answer(send=False)

        def do_GET(self):
            self._answer(send=True)

        def _answer(self, send):
            name = self.path.strip("/")
            if name == TABLES[1]:
                may_read.wait(120)
            body = "".join(f"dog {name} {i}\n" for i in range(4)).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if send:
                self.wfile.write(body)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Tables) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield [f"http://127.0.0.1:{server.server_port}/{name}" for name in TABLES], may_read
        may_read.set()
        server.shutdown()
        thread.join()


def drawing_actors(state):
    """Return the ids of the drawing actors in a state of Ray's."""
    actors = ray._private.state.actors().values()
    drawing = [each for each in actors if "DrawingActor" in each["ActorClassName"]]
    return {each["ActorID"] for each in drawing if each["State"] == state}


def end_for_good(actors):
    """End actors as ray.kill does, so that Ray does not start them again."""
    for each in actors:
        ray._private.worker.global_worker.core_worker.kill_actor(ray.ActorID.from_hex(each), True)
    wait_until(lambda: actors <= drawing_actors("DEAD"))


def receipts(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.glob("receipts/*.json")}


def data(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "data").iterdir()}


def test_idle_actors_that_are_dead_for_good_are_replaced(ray_local, make_job, tables, tmp_path):
    urls, may_read = tables
    job = make_job(prompts={"path": urls}, cluster={"actors": 2}, output={"images_per_shard": 2})
    ready = pipeline.prepare(job)
    may_read.clear()

    def end_all():
        try:
            wait_until(lambda: len(receipts(tmp_path / "out")) == 2, 120)  # no more can be read
            ended = drawing_actors("ALIVE")
            end_for_good(ended)
            return ended
        finally:
            may_read.set()

    with ThreadPoolExecutor(1) as thread:
        ended = thread.submit(end_all)
        report = pipeline.draw(ready, display=SilentDisplay(), make_engine=FakeEngine)
        assert len(ended.result()) == 2
    assert (report.stopped, report.images, report.failed) == (None, 8, 0)
    alone = job.updated(output=job.output.updated(path=str(tmp_path / "alone")))
    without_ray.draw(alone)
    assert data(tmp_path / "out") == data(tmp_path / "alone")


def test_actors_that_end_for_good_while_they_draw_end_the_run_which_can_be_resumed(
    ray_local, make_job, prompts, tmp_path
):
    lines = [f"dog {i}" for i in range(40)]
    job = make_job(
        prompts={"path": prompts(*lines)}, cluster={"actors": 2}, output={"images_per_shard": 2}
    )
    engine = partial(engines.Held, tmp_path / "go", 20)

    def end_all():
        wait_until(lambda: receipts(tmp_path / "out"), 120)
        before = receipts(tmp_path / "out")
        end_for_good(drawing_actors("ALIVE"))
        return before

    with ThreadPoolExecutor(1) as thread:
        ending = thread.submit(end_all)
        report = pipeline.draw(pipeline.prepare(job), display=SilentDisplay(), make_engine=engine)
        before = ending.result()
    assert report.stopped.startswith("Ray failed: The actor died")
    assert report.exit_code == 1
    (tmp_path / "go").touch()
    assert without_ray.draw(job, make_engine=engine).exit_code == 0
    assert before.items() <= receipts(tmp_path / "out").items()


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_an_actor_that_is_suspended_ends_the_run_which_can_be_resumed(
    ray_local, make_job, prompts, tmp_path, monkeypatch
):
    job = make_job(
        prompts={"path": prompts(*(f"dog {i}" for i in range(30)))},
        cluster={"actors": 1},
        output={"images_per_shard": 2},
    )
    pids = tmp_path / "pids"
    pids.mkdir()

    def suspend():
        wait_until(lambda: receipts(tmp_path / "out"), 120)
        (process,) = (int(path.name) for path in pids.iterdir())
        os.kill(process, signal.SIGSTOP)
        monkeypatch.setattr(stall, "SILENT_SECONDS", 1.0)
        return process

    with ThreadPoolExecutor(1) as thread:
        suspending = thread.submit(suspend)
        engine = partial(engines.Known, pids)
        report = pipeline.draw(pipeline.prepare(job), display=SilentDisplay(), make_engine=engine)
        os.kill(suspending.result(), signal.SIGKILL)
    assert "no sign of life from any drawing actor" in report.stopped
    assert "the processes hang, or something has suspended them" in report.stopped
    assert report.exit_code == 1
    assert without_ray.draw(job).exit_code == 0

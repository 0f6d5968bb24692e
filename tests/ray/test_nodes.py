"""A cluster whose nodes die, are reclaimed and join while a run draws; the driver's node stays.

A node is a raylet with its own workers, all on this machine.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import ray

from sdbatch.batch import pipeline
from sdbatch.batch.liveness import LivenessClient
from sdbatch.output import receipts
from sdbatch.output.record import read_record
from sdbatch.output.verify import verify_output
from sdbatch.report.progress import SilentDisplay
from sdbatch.storage import Store
from tests import nodes, without_ray
from tests.fakes import FakeEngine
from tests.ray import engines
from tests.wait import wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc"),
]
BIN = Path(sys.executable).parent
CPUS = 3  # of a node: one actor of two, and the cheap stages
SHARDS = 36


@dataclass(frozen=True)
class Node:
    id: str
    raylet: int

    def workers(self) -> list[int]:
        """Return the processes that the raylet has started, and theirs."""
        found = [self.raylet]
        for process in found:
            with contextlib.suppress(OSError):  # it has ended
                for task in Path(f"/proc/{process}/task").iterdir():
                    found += map(int, (task / "children").read_text().split())
        return found[1:]

    def lose(self) -> None:
        """End all processes at once, as if the machine were gone."""
        os.kill(self.raylet, signal.SIGSTOP)  # so that it starts no more
        for process in [*self.workers(), self.raylet]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def drain(self, address: str, seconds: int) -> None:
        """Announce that the machine is reclaimed, as cluster/spot.py does."""
        drain = [str(BIN / "ray"), "drain-node", "--address", address, "--node-id", self.id]
        drain += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        subprocess.run([*drain, "--deadline-remaining-seconds", str(seconds)], check=True)

    def drawing(self) -> list[int]:
        """Return the processes that draw."""
        found = []
        for process in self.workers():
            with contextlib.suppress(OSError):
                if b"DrawingActor" in Path(f"/proc/{process}/cmdline").read_bytes():
                    found.append(process)
        return found

    def end_drawing(self) -> None:
        """End the processes that draw, but not the raylet."""
        for process in self.drawing():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


class Cluster:
    """A cluster in processes of its own, of a head that draws nothing and the nodes added."""

    def __init__(self, process: subprocess.Popen) -> None:
        self._process = process
        self.address = json.loads(process.stdout.readline())["address"]

    def add(self, cpus: int = CPUS) -> Node:
        self._process.stdin.write(f"{cpus}\n")
        self._process.stdin.flush()
        return Node(**json.loads(self._process.stdout.readline()))


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with (
        pytest.MonkeyPatch.context() as patch,
        nodes.running(0, RAY_AUTH_MODE="disabled") as process,
    ):
        patch.setenv("RAY_AUTH_MODE", "disabled")
        cluster = Cluster(process)
        ray.init(cluster.address, log_to_driver=False, logging_level="error")
        yield cluster
        ray.shutdown()


@pytest.fixture
def job(make_job, prompts):
    """Return a job for three actors, each of which fills a node; one row cannot be drawn."""
    lines = [f"dog {i}" for i in range(4 * SHARDS)]
    table = prompts("prompt,height", "dog 0,63", *(f"{line}," for line in lines[1:]), name="t.csv")
    return make_job(
        prompts={"path": table},
        sampling={"height": 256, "width": 256},
        cluster={"actors": 3, "cpus_per_actor": 2},
        output={"images_per_shard": 4},
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*")}


def disturb(job, engine, fault):
    """Run `job`; when it has receipts, let `fault` happen, in another thread; return the report."""
    output = Path(job.output.path)

    def wait_and_disturb():
        wait_until(lambda: len(list(output.glob("receipts/*.json"))) >= 4, 120)
        before = {path: path.read_bytes() for path in output.glob("receipts/*.json")}
        fault()
        return before

    with ThreadPoolExecutor(1) as thread:
        disturbing = thread.submit(wait_and_disturb)
        ready = pipeline.prepare(job)
        report = pipeline.draw(ready, display=SilentDisplay(), make_engine=engine)
        before = disturbing.result()
    assert before == {path: path.read_bytes() for path in before}  # what is committed stays
    return report


def check_undisturbed(job, engine):
    """Check that the output of `job` has the bytes of one that nothing disturbed."""
    output = Path(job.output.path)
    assert list(verify_output(Store(str(output)))) == []
    alone = job.updated(
        output=job.output.updated(path=f"{output}-alone"), cluster=job.cluster.updated(actors=1)
    )
    without_ray.draw(alone, make_engine=engine)
    for folder in ("data", "failed"):
        assert contents(Path(alone.output.path) / folder) == contents(output / folder)


def facts(job):
    store = Store(job.output.path)
    return [receipt.facts for receipt in receipts.proved(store, read_record(store).proof())]


def test_a_run_goes_on_when_a_node_dies_and_another_joins(cluster, job, tmp_path):
    lost, *_ = (cluster.add() for _ in range(3))
    engine = partial(engines.Held, tmp_path / "go", 2 * SHARDS)

    def fault():
        lost.lose()
        cluster.add()
        (tmp_path / "go").touch()

    report = disturb(job, engine, fault)
    assert (report.stopped, report.images, report.failed) == (None, 4 * SHARDS - 1, 1)
    assert not any("isolated" in each for each in facts(job))  # the node explains the deaths
    check_undisturbed(job, engine)


def test_a_full_cluster_goes_on_when_a_node_dies_and_none_joins(cluster, make_job, prompts):
    small = [cluster.add(cpus=1) for _ in range(3)]
    job = make_job(
        prompts={"path": prompts(*(f"dog {i}" for i in range(400)))},
        cluster={"actors": 2, "cpus_per_actor": 1},
        output={"images_per_shard": 1},
    )

    def fault():  # then two actors take the CPUs of both nodes
        next(node for node in small if node.drawing()).lose()

    report = disturb(job, FakeEngine, fault)
    assert (report.stopped, report.images, report.failed) == (None, 400, 0)
    check_undisturbed(job, FakeEngine)


def test_a_node_that_is_reclaimed_hands_its_shards_over(cluster, job, tmp_path):
    spot, *_ = (cluster.add() for _ in range(3))
    engine = partial(engines.Held, tmp_path / "go", 2 * SHARDS)

    def fault():
        spot.drain(cluster.address, seconds=120)
        staying = LivenessClient(None).living_nodes()  # on others, a death counts against no shard
        assert staying == {each["NodeID"] for each in ray.nodes() if each["Alive"]} - {spot.id}
        assert len(staying) == 3
        cluster.add()
        spot.end_drawing()
        (tmp_path / "go").touch()

    report = disturb(job, engine, fault)
    assert (report.stopped, report.images, report.failed) == (None, 4 * SHARDS - 1, 1)
    assert not any("isolated" in each for each in facts(job))
    assert any(each["attempt"] > 1 for each in facts(job))
    check_undisturbed(job, engine)

"""Rows of all modes on a real Ray: the same bytes with one actor and two, killed twice and resumed.

benchmarks/mixed_modes.py says how fast they are drawn.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sdbatch.job import load
from sdbatch.output.verify import verify_output
from sdbatch.storage import Store
from tests import mixed_rows, without_ray
from tests.chaos.campaign import hashes
from tests.ray.processes import marked, processes, ray_files
from tests.wait import wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
SDBATCH = str(Path(sys.executable).parent / "sdbatch")
ROWS = 400
SHARDS = 40
STEPS = (2, 3, 4)
KILLS = (4, 20)  # receipts, at least, when a run is killed


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny_model):
    """A job of all modes, and its output from a run without Ray that was left alone."""
    folder = tmp_path_factory.mktemp("undisturbed")
    mixed_rows.write_table(folder / "rows.parquet", ROWS, STEPS)
    job = folder / "job.yaml"
    job.write_text(
        f"prompts: {{path: {folder}/rows.parquet}}\n"
        f"model: {tiny_model}\n"
        "engine: {lanes: 4}\n"
        f"output: {{path: overridden, images_per_shard: {ROWS // SHARDS}}}\n"
    )
    alone = folder / "alone"
    report = without_ray.draw(load(job, [f"output.path={alone}"]), make_engine=None)
    assert (report.exit_code, report.images) == (0, ROWS)
    return job, alone


def kill_all(folder):
    """Kill a command and the Ray that it started."""
    for pid in processes(f"RAY_TMPDIR={folder}"):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


@pytest.mark.slow
@pytest.mark.timeout(1500)  # it starts Ray three times
@pytest.mark.parametrize("actors", [1, 2])
def test_rows_of_all_modes_have_the_same_bytes_after_two_kills(undisturbed, tmp_path, actors):
    job, alone = undisturbed
    output = tmp_path / "killed"
    command = [SDBATCH, "run", str(job), "--json"]
    command += ["--set", f"output.path={output}", "--set", f"cluster.actors={actors}"]

    def start(folder):
        return subprocess.Popen(command, env=marked(folder), stdout=subprocess.DEVNULL)

    def receipts():
        return {path.name: path.read_bytes() for path in output.glob("receipts/*.json")}

    def run_and_kill(count):
        with ray_files() as folder:
            run = start(folder)
            wait_until(lambda: len(receipts()) >= count or run.poll() is not None, 400)
            kill_all(folder)
            assert run.wait() == -signal.SIGKILL

    kept = {}
    for count in KILLS:
        run_and_kill(count)
        now = receipts()
        assert count <= len(now) < SHARDS
        assert {name: now[name] for name in kept} == kept  # none was drawn again
        kept = now
    with ray_files() as folder:
        assert start(folder).wait() == 0
    after = receipts()
    assert len(after) == SHARDS
    assert {name: after[name] for name in kept} == kept
    assert hashes(output) == hashes(alone)
    assert list(verify_output(Store(str(output)))) == []

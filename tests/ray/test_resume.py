"""kill -9 of an actor and of the driver, then the same command: the same bytes, nothing left over.

Other victims and moments: tests/chaos.
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
from tests import without_ray
from tests.chaos.campaign import hashes
from tests.ray.processes import find_process, marked, ray_files
from tests.wait import wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
SDBATCH = str(Path(sys.executable).parent / "sdbatch")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny_model):
    """A job of 20 shards, and its output from a run without Ray that was left alone."""
    folder = tmp_path_factory.mktemp("undisturbed")
    lines = [f"a dog, number {i}" for i in range(99)] + ["x" * 500]
    (folder / "prompts.txt").write_text("\n".join(lines))
    job = folder / "job.yaml"
    job.write_text(
        f"prompts: {{path: {folder}/prompts.txt, images_per_row: 2}}\n"
        f"model: {tiny_model}\n"
        "sampling: {sampler: euler_a, num_inference_steps: 10, height: 64, width: 64}\n"
        "output: {path: overridden, images_per_shard: 10}\n"
    )
    alone = folder / "alone"
    report = without_ray.draw(load(job, [f"output.path={alone}"]), make_engine=None)
    assert report.exit_code == 0
    return job, alone


@pytest.fixture
def ray_folder():
    with ray_files() as folder:
        yield folder


@pytest.mark.slow
def test_data_is_byte_identical_and_nothing_is_left_over_after_kills(
    undisturbed, tmp_path, ray_folder
):
    job, alone = undisturbed
    output = tmp_path / "killed"
    command = [SDBATCH, "run", str(job), "--set", f"output.path={output}", "--json"]

    def start():
        return subprocess.Popen(command, env=marked(ray_folder), stdout=subprocess.DEVNULL)

    def receipts():
        return {path.name: path.read_bytes() for path in output.glob("receipts/*.json")}

    def drawing_actor():
        return find_process(ray_folder, "DrawingActor")

    driver = start()
    wait_until(lambda: receipts() and drawing_actor(), 120)
    before = receipts()
    os.kill(drawing_actor(), signal.SIGKILL)
    wait_until(lambda: len(receipts()) > len(before), 120)  # it goes on by itself
    before = receipts()
    driver.kill()
    driver.wait()
    assert len(before) < 20
    assert start().wait() == 0
    after = receipts()
    assert {name: after[name] for name in before} == before  # none was drawn again
    assert hashes(output) == hashes(alone)
    assert list(verify_output(Store(str(output)))) == []

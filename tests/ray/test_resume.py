"""kill -9 at random moments, then the same command: the same bytes, nothing left over.

Ten kills over a larger run: `python benchmarks/kills.py JOB`.
"""

import random
import sys

import pytest

from benchmarks.kills import compare, kill_and_resume, run
from sdbatch.output.verify import verify_output
from sdbatch.storage import Store

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny_model):
    """A job of 20 shards, and its output from a run that was left alone."""
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
    assert run(job, folder / "alone") == 0
    return job, folder / "alone"


@pytest.mark.parametrize(("victim", "kills"), [("driver", 3), ("actor", 2)])
def test_data_is_byte_identical_and_nothing_is_left_over_after_kills(
    undisturbed, tmp_path, victim, kills
):
    job, alone = undisturbed
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed of the moments: {seed}")  # noqa: T201  to have them again
    moments, drawn_again = kill_and_resume(job, tmp_path / "killed", kills, seed, victim)
    assert drawn_again == [], f"seed {seed}"
    assert compare(alone, tmp_path / "killed") == [], f"seed {seed}"
    assert list(verify_output(Store(str(tmp_path / "killed")))) == [], f"seed {seed}"
    print(f"shards committed at the kills: {moments}")  # noqa: T201
    assert moments, "no kill came in time"

"""`sdbatch run` as a user runs it, on the embedded model and a Ray of its own.

tests/batch/test_run_command.py has the command without Ray.
"""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from sdbatch.cli import main

SDBATCH = str(Path(sys.executable).parent / "sdbatch")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A job over a table of 100 rows, 7 of them bad: one drawn all the same, 6 that fail."""
    rows = [
        {
            "caption": f"a dog, number {i}",
            "width": 64,
            "num_inference_steps": 2,
            "sampler": "euler",
            "seed": i,
            "guidance_scale": 2.0,
            "tags": ["dog", str(i)],
            "where": {"x": i, "y": None},
        }
        for i in range(100)
    ]
    rows[10]["caption"] = None
    rows[20]["width"] = 513
    rows[30]["num_inference_steps"] = 0
    rows[40]["sampler"] = "magic"
    rows[50]["seed"] = -1
    rows[60]["guidance_scale"] = math.nan
    rows[70]["caption"] = "x" * 20_000
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "table.parquet")
    (tmp_path / "job.yaml").write_text(
        "prompts: {path: table.parquet, columns: {prompt: caption}}\n"
        "model: builtin:shapes\nsampling: {height: 64}\ncluster: {actors: 1}\n"
        "output: {path: out, images_per_shard: 40}\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def sdbatch(capfd):
    """Run a command in this process; return its exit code, stdout and stderr."""

    def command(*arguments):
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        return ended.value.code, *capfd.readouterr()

    return command


def test_bad_rows_are_kept_with_their_reasons_and_the_others_drawn(here, sdbatch):
    done = subprocess.run([SDBATCH, "run", "job.yaml"], capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    assert "Finished: 94 images of 100, 6 failed." in done.stdout
    assert "it/s" not in done.stdout + done.stderr  # neither Ray's nor diffusers' bars and logs
    notes = done.stderr.splitlines()
    assert [note for note in notes if not note.startswith("Note: 1 of the first 100 rows")] == []
    drawn = ds.dataset(here / "out" / "data").to_table()
    failed = ds.dataset(here / "out" / "failed").to_table().to_pylist()
    assert drawn.num_rows == 94
    long = drawn.filter(pa.compute.equal(drawn["row_key"], "70")).to_pylist()[0]
    assert (long["prompt_truncated"], long["prompt_tokens"]) == (True, 20_000)
    assert long["tags"] == ["dog", "70"]
    assert long["where"] == {"x": 70, "y": None}
    reasons = {int(row["row_key"]): row["error"] for row in failed}
    expected = {
        10: "prompt = null",
        20: "width = 513: must be a multiple of 8",
        30: "num_inference_steps = 0",
        40: "sampler = 'magic'",
        50: "seed = -1",
        60: "guidance_scale = nan",
    }
    assert reasons.keys() == expected.keys()
    warned = [int(re.search(r"the first is row '(\d+)'", note)[1]) for note in notes]
    assert sorted(warned) == sorted(expected)  # before anything was drawn
    assert [row for row, words in expected.items() if words not in reasons[row]] == []
    assert {row["width"] for row in failed} == {64, 513}  # what was asked is kept

    code, _, err = sdbatch("run", "job.yaml")  # nothing to do: the same end, at once
    assert (code, err) == (3, "")
    assert sdbatch("verify", "out") == (0, "out: no faults\n", "")
    assert "94 of 100" not in sdbatch("status", "out")[2]
    status = json.loads(sdbatch("status", "out", "--json")[1])
    assert (status["state"], status["images"], status["failed"]) == ("finished", 94, 6)
    assert "committed  100 images, 3 shards" in sdbatch("plan", "job.yaml")[1]


def test_sigterm_while_ray_starts_ends_the_run_and_leaves_nothing(here):
    command = [SDBATCH, "run", "job.yaml"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as run:
        while "starting Ray" not in run.stdout.readline():
            assert run.poll() is None
        run.terminate()
        _, err = run.communicate()
    assert (run.returncode, err.splitlines()[-1][:18]) == (1, "Error: interrupted")
    assert not (here / "out").exists()

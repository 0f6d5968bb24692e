"""`sdbatch run` as a user runs it, on the embedded model and a Ray of its own."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

SDBATCH = str(Path(sys.executable).parent / "sdbatch")


def sdbatch(*arguments, cwd):
    return subprocess.run([SDBATCH, *arguments], capture_output=True, text=True, cwd=cwd)


@pytest.fixture
def here(tmp_path):
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
    return tmp_path


def test_bad_rows_are_kept_with_their_reasons_and_the_others_drawn(here):
    done = sdbatch("run", "job.yaml", cwd=here)
    assert done.returncode == 3, done.stderr
    assert "Finished: 94 images of 100, 6 failed." in done.stdout
    assert "it/s" not in done.stdout + done.stderr  # neither Ray's nor diffusers' bars and logs
    assert done.stderr == ""
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
    assert [row for row, words in expected.items() if words not in reasons[row]] == []
    assert {row["width"] for row in failed} == {64, 513}  # what was asked is kept

    again = sdbatch("run", "job.yaml", cwd=here)  # nothing to do: the same end, at once
    assert (again.returncode, again.stderr) == (3, "")
    assert sdbatch("verify", "out", cwd=here).stdout == "out: no faults\n"
    assert "94 of 100" not in sdbatch("status", "out", cwd=here).stderr
    status = json.loads(sdbatch("status", "out", "--json", cwd=here).stdout)
    assert (status["state"], status["images"], status["failed"]) == ("finished", 94, 6)
    plan = sdbatch("plan", "job.yaml", cwd=here).stdout
    assert "committed  100 images, 3 shards" in plan


def test_what_the_model_can_draw_for_no_row_keeps_the_job_from_starting(here):
    (here / "p.txt").write_text("a dog\na cat\n")
    sets = ["prompts={path: p.txt}", "sampling.clip_skip=9"]
    asked = [word for one in sets for word in ("--set", one)]
    done = sdbatch("run", "job.yaml", *asked, cwd=here)
    assert done.returncode == 2, done.stderr
    assert done.stderr == (
        "Error: sampling: the model cannot draw this: clip_skip = 9: must be below 2, "
        "the layers of the text encoder.\n"
    )
    assert not (here / "out").exists()


def test_json_is_one_object_a_line_and_ends_with_the_report(here):
    done = sdbatch("run", "job.yaml", "--set", "prompts.limit=5", "--json", cwd=here)
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert {event["event"] for event in events} == {"progress", "report"}
    report = events[-1]
    assert (report["event"], report["images"], report["exit_code"]) == ("report", 5, 0)
    assert list(report["startup"]) == ["ray", "model", "image", "shard"]


def test_python_runs_the_same_code(here):
    program = (
        "import sdbatch\n"
        "job = sdbatch.load_job('job.yaml', ['prompts.limit=3', 'output.format=webdataset'])\n"
        "if __name__ == '__main__':\n"
        "    report = sdbatch.run(job)\n"
        "    print(report.images, report.failed, report.exit_code)\n"
    )
    (here / "program.py").write_text(program)
    done = subprocess.run(
        [sys.executable, "program.py"], capture_output=True, text=True, cwd=here, check=True
    )
    assert done.stdout.splitlines()[-1] == "3 0 0"
    assert [path.name for path in (here / "out" / "data").iterdir()] == ["000000.tar"]

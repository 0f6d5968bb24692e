"""`sdbatch run` and `sdbatch.run` in this process, without Ray, on the embedded model."""

import json
import os

import pytest

import sdbatch
from sdbatch.cli import main
from sdbatch.engine.device import device_facts
from sdbatch.output import lease
from sdbatch.storage import Store
from tests.without_ray import without_ray


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a job of two images, as the working folder."""
    (tmp_path / "p.txt").write_text("a dog\na cat\n")
    (tmp_path / "job.yaml").write_text(
        "prompts: {path: p.txt}\nmodel: builtin:shapes\n"
        "sampling: {height: 64, width: 64, num_inference_steps: 2}\noutput: {path: out}\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments):
    """Run the command; return its exit code."""
    with without_ray(), pytest.raises(SystemExit) as ended:
        main(["run", "job.yaml", *arguments])
    return ended.value.code


def test_what_the_model_can_draw_for_no_row_keeps_the_job_from_starting(here, capfd):
    assert run("--set", "sampling.clip_skip=9") == 2
    last = capfd.readouterr().err.splitlines()[-1]  # after a bar, which actors show in their logs
    assert last == (
        "Error: sampling: the model cannot draw this: clip_skip = 9: must be below 2, "
        "the layers of the text encoder."
    )
    assert not (here / "out").exists()


def test_a_program_that_calls_the_command_is_not_forked(here, monkeypatch):
    def fork():
        raise AssertionError("this process was forked")

    monkeypatch.setattr(os, "fork", fork)
    assert run() == 0


def test_json_is_one_object_a_line_and_ends_with_the_report(here, capfd):
    assert run("--json") == 0
    events = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert {event["event"] for event in events} == {"progress", "report"}
    report = events[-1]
    assert (report["event"], report["images"], report["exit_code"]) == ("report", 2, 0)
    assert list(report["startup"]) == ["ray", "model", "image", "shard"]


def test_a_second_run_prints_who_draws_the_output_and_writes_nothing(here, capfd):
    held = lease.take(Store(str(here / "out")))
    assert run("--overwrite") == 2
    out, err = capfd.readouterr()
    assert out == ""  # nothing to wait for: the run is on this machine
    assert err.splitlines()[-1] == (
        f"Error: output.path = {here}/out: {held.run.describe()} is drawing it: must have one run "
        f"at a time. Wait until that run ends, or stop it; `sdbatch status {here}/out` shows it."
    )
    assert [path.name for path in (here / "out").iterdir()] == ["runs"]


def verify(*options):
    """Check the output with the command; return its exit code."""
    with pytest.raises(SystemExit) as ended:
        main(["verify", "out", *options])
    return ended.value.code


def test_verify_repairs_a_shard_that_the_next_run_draws_again(here, capfd):
    assert run("--set", "output.images_per_shard=1") == 0
    assert verify() == 0
    data = here / "out" / "data" / "000001.parquet"
    sound = data.read_bytes()
    data.write_bytes(b"x" * len(sound))  # the size says nothing
    capfd.readouterr()

    assert verify("--repair") == 1
    lines = capfd.readouterr().out.splitlines()
    assert "data/000001.parquet" in lines[0]
    assert "its checksum differs from the receipt's" in lines[0]
    assert lines[-2:] == ["out: 1 faults", "out: the next run draws 1 shards again"]
    receipts = here / "out" / "receipts"
    assert [path.name for path in receipts.iterdir()] == ["000000.json"]

    assert run("--set", "output.images_per_shard=1") == 0
    assert (verify(), data.read_bytes()) == (0, sound)


def test_verify_says_if_several_kinds_of_device_drew_the_output(here, capfd):
    assert run("--set", "output.images_per_shard=1") == 0
    receipt = here / "out" / "receipts" / "000001.json"
    values = json.loads(receipt.read_text())
    assert values["facts"]["device"] == device_facts("cpu")
    values["facts"]["device"]["name"] = "another processor"
    receipt.write_text(json.dumps(values))
    capfd.readouterr()

    verify()
    note = capfd.readouterr().out.splitlines()[-2]
    assert note.startswith("Note: 2 kinds of device drew this output: 1 images by ")
    assert "another processor" in note


def test_verify_draws_images_again_and_says_so(here, capfd):
    assert run() == 0
    capfd.readouterr()
    assert verify("--redraw", "2") == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == "out: no faults"
    assert sorted(lines[1:]) == [
        "000000-000000: drawn again, the same bytes",
        "000000-000001: drawn again, the same bytes",
    ]


def test_python_runs_the_same_code(here):
    job = sdbatch.load_job("job.yaml", ["prompts.limit=1", "output.format=webdataset"])
    with without_ray():
        report = sdbatch.run(job)
    assert (report.images, report.failed, report.exit_code) == (1, 0, 0)
    assert [path.name for path in (here / "out" / "data").iterdir()] == ["000000.tar"]

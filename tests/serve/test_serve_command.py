"""`sdbatch serve` that cannot start: one line, before Ray or as soon as the machines are known."""

import socket

import pytest
import yaml

from sdbatch.batch import ray_setup
from sdbatch.cli import main
from sdbatch.errors import JobError
from sdbatch.job import parse
from sdbatch.serve import application
from tests.without_ray import MACHINES

JOB = {
    "prompts": {"rows": [{"prompt": "a red circle"}]},
    "model": "builtin:shapes",
    "sampling": {"height": 64, "width": 64},
    "output": {"path": "out"},
}


def refused(tmp_path, capfd, *options):
    """Run the command; return the one line of its error."""
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(JOB))
    with pytest.raises(SystemExit) as ended:
        main(["serve", str(tmp_path / "job.yaml"), *options])
    assert ended.value.code == 2
    [line] = capfd.readouterr().err.splitlines()
    return line


def test_a_port_that_is_taken_is_refused_before_anything_starts(tmp_path, capfd):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        line = refused(tmp_path, capfd, "--port", str(taken.getsockname()[1]))
    assert "cannot listen there (Address already in use). Choose another port." in line


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_all_the_world_is_refused_without_keys(tmp_path, capfd, host):
    line = refused(tmp_path, capfd, "--host", host)
    words = "must be an address of this machine alone, as there are no API keys"
    assert f"--host = '{host}': {words}" in line
    assert "SDBATCH_API_KEYS" in line


def test_a_host_that_is_not_this_machines_is_refused(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("SDBATCH_API_KEYS", "0" * 16)
    line = refused(tmp_path, capfd, "--host", "203.0.113.7")
    assert "--host, --port = 203.0.113.7, 8000: cannot listen there" in line


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"serve": {"min_replicas": 1000}}, "serve.min_replicas = 1000: must be 2 at most"),
        (
            {"sampling": {"height": 64, "width": 64, "num_inference_steps": 500}},
            "sampling.num_inference_steps = 500: must be 150 at most. Raise serve.limits",
        ),
        (
            {"sampling": {"hires_scale": 4, "num_inference_steps": 4}},
            "sampling.size = 2048x2048 after hires fix: must have 1048576 pixels at most",
        ),
    ],
)
def test_a_job_that_exceeds_the_machines_or_its_own_limits_is_refused(monkeypatch, sections, words):
    monkeypatch.setattr(ray_setup, "machines", lambda labels: MACHINES)
    with pytest.raises(JobError, match=words):
        application.make_application(parse({**JOB, **sections}), digests=())


def test_the_reason_of_a_failed_deployment_is_the_error_of_ours_in_serves_text():
    text = """\
The deployment failed to start 1 times in a row. This may be due to a problem with its constructor.
Error:
ray::ServeReplica:sdbatch:Drawer.initialize_and_get_metadata() (pid=1, ip=192.0.2.1)
  File "sdbatch/resolve.py", line 179, in load_engine
    raise ModelError(f"sampling: the model cannot draw this: {text}.") from error
sdbatch.errors.ModelError: sampling: the model cannot draw this: clip_skip = 90: must be below 2.

The above exception was the direct cause of the following exception:
"""
    reason = application._failure_reason([text, ""])
    assert reason == "sampling: the model cannot draw this: clip_skip = 90: must be below 2."

"""A Ray that somebody else started, by address; and addresses where there is none."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sdbatch.batch import ray_setup
from sdbatch.errors import JobError
from sdbatch.job import Cluster

BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def ray_head():
    """Start a Ray of its own on this machine; yield its address and the environment for it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    start = [str(BIN / "ray"), "start", "--head", f"--port={port}", "--num-cpus=3", "--block"]
    head = subprocess.Popen(
        [*start, "--include-dashboard=false"],
        env=environment,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            break
        except OSError:
            time.sleep(0.2)
    yield f"127.0.0.1:{port}", environment
    # Not `ray stop`, which ends every Ray of the machine; nor SIGTERM, after which it waits 30 s.
    os.killpg(head.pid, signal.SIGKILL)
    head.wait()


@pytest.mark.parametrize("how", ["--address", "RAY_ADDRESS"])
def test_run_uses_the_ray_at_an_address_and_leaves_it_running(ray_head, tmp_path, how):
    address, environment = ray_head
    (tmp_path / "p.txt").write_text("a dog\na cat\n")
    (tmp_path / "job.yaml").write_text(
        "prompts: {path: p.txt}\nmodel: builtin:shapes\n"
        "sampling: {height: 64, width: 64, num_inference_steps: 2}\n"
        "cluster: {actors: 1}\noutput: {path: out}\n"
    )
    command = [str(BIN / "sdbatch"), "run", "job.yaml"]
    command += ["--address", address] if how == "--address" else []
    if how == "RAY_ADDRESS":
        environment = {**environment, "RAY_ADDRESS": address}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Finished: 2 images of 2" in done.stdout
    host, port = address.split(":")
    socket.create_connection((host, int(port)), 5).close()


def test_an_address_where_something_else_listens_is_given_up():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        probe = (
            "from sdbatch.batch import ray_setup; from sdbatch.job import Cluster;"
            "ray_setup.CONNECT_SECONDS = 3.0\n"
            f"with ray_setup.connected('{address}', Cluster()): pass"
        )
        done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert "no Ray answers there (no answer in 3 s)" in done.stderr
    assert "RAY_AUTH_MODE=token" in done.stderr


def test_an_address_where_nothing_listens_is_refused_at_once():
    with pytest.raises(JobError, match=r"cluster.address = '127.0.0.1:1': no Ray answers"):  # noqa: SIM117
        with ray_setup.connected("127.0.0.1:1", Cluster()):
            pass

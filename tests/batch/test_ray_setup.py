"""Starting a Ray or connecting to one."""

import socket
import subprocess
import sys

import pytest

from sdbatch.batch import ray_setup
from sdbatch.errors import JobError


def test_a_machine_too_busy_for_a_ray_is_reported_in_one_line(make_job, monkeypatch):
    def too_slow(*_, **__):
        raise Exception("The current node timed out during startup.")  # as Ray does

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.init", too_slow)
    with (
        pytest.raises(JobError, match=r"cannot start on this machine \(.* timed out .* less busy"),
        ray_setup.connected(None, make_job()),
    ):
        pass


def test_an_address_where_something_else_listens_is_given_up():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        probe = (
            "from sdbatch.batch import ray_setup; from sdbatch.job import Cluster;"
            "ray_setup.CONNECT_SECONDS = 1.0\n"
            f"with ray_setup.connected('{address}', Cluster()): pass"
        )
        done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert "no Ray answers there (no answer in 1 s)" in done.stderr
    assert "RAY_AUTH_MODE=token" in done.stderr


def test_an_address_where_nothing_listens_is_refused_at_once(make_job):
    with (
        pytest.raises(JobError, match=r"cluster.address = '127.0.0.1:1': no Ray answers"),
        ray_setup.connected("127.0.0.1:1", make_job()),
    ):
        pass

"""Starting a Ray or connecting to one."""

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

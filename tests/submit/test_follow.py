"""Following a job: a log over connections that break, and the exit code at the end."""

import pytest

from sdbatch.errors import JobError
from sdbatch.storage import Store
from sdbatch.submit import follow
from sdbatch.submit.jobs import State

LOG = "one\ntwo\nthree\nfour"


class FakeJobs:
    """A cluster whose connections break, until one has sent all of LOG but its last characters."""

    def __init__(self, *, exit_code=0, loses_log=False):
        self.breaks_after = [2, 6, 11, len(LOG) - 2]  # characters of each connection
        self.exit_code = exit_code
        self.loses_log = loses_log

    async def tail_log(self, name):
        if self.breaks_after:
            for start in range(0, self.breaks_after[0], 2):
                yield LOG[start : min(start + 2, self.breaks_after[0])]
            self.breaks_after.pop(0)
        raise JobError("the connection broke")

    def read_log(self, name):
        if self.loses_log:
            raise JobError("the cluster is gone")
        return LOG

    def state(self, name):
        return State(not self.breaks_after, self.exit_code, "FAILED: reason")


@pytest.fixture
def follow_fake(monkeypatch, tmp_path):
    """Return a function that follows a fake job: its exit code and the lines shown."""
    monkeypatch.setattr(follow, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(follow, "RETRY_SECONDS", 0.01)

    def run(jobs):
        lines = []
        code = follow.follow_job(jobs, "job", Store(str(tmp_path / "out")), None, lines.append)
        return code, lines

    return run


def test_every_line_of_a_log_is_shown_once_over_broken_connections(follow_fake):
    assert follow_fake(FakeJobs()) == (0, LOG.split("\n"))


def test_a_log_whose_end_is_lost_says_so(follow_fake):
    code, lines = follow_fake(FakeJobs(loses_log=True))
    assert code == 0
    assert lines[:3] == ["one", "two", "three"]
    assert lines[-1] == "the end of the log is missing (the cluster is gone)"


def test_a_job_without_an_exit_code_is_an_error_with_its_status(follow_fake):
    code, lines = follow_fake(FakeJobs(exit_code=None))
    assert code == 1
    assert lines[-1] == "Error: the job ended without an exit code, FAILED: reason"


def test_a_cluster_without_sdbatch_is_an_error_with_the_way_out(follow_fake):
    code, lines = follow_fake(FakeJobs(exit_code=127))
    assert code == 127
    assert "sdbatch is not installed on the cluster. Submit with --pip" in lines[-1]

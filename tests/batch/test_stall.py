"""When a run ends because nothing moves."""

import pytest

from sdbatch.batch import stall
from sdbatch.batch.liveness import Liveness
from sdbatch.batch.stall import SILENT_SECONDS, STALL_SECONDS, Stall


class Run:
    """A run of one actor on the node "a", looked at whenever the clock is set."""

    def __init__(self, job):
        self.now = 0.0
        self.nodes = {"a"}
        self.liveness = Liveness(1)
        self._stall = Stall(job, lambda: self.now)

    def look(self, seconds, receipts=0):
        self.now += seconds
        return self._stall.reason(self.liveness.snapshot([]), receipts, lambda: self.nodes)


@pytest.fixture
def run(make_job):
    run = Run(make_job())
    run.liveness.loading()
    run.liveness.loaded()
    return run


def test_a_run_ends_soon_when_the_actors_that_draw_are_silent(run):
    for shard in (0, 1):
        run.liveness.begin(shard, "a")
    assert run.look(0) is None
    assert run.look(SILENT_SECONDS) is None
    reason = run.look(1)
    assert reason.startswith(
        "no sign of life from any drawing actor for 5 minutes, though 2 shards"
    )


def test_an_actor_that_draws_nothing_new_but_beats_has_longer(run):
    """As while it compiles."""
    run.liveness.begin(0, "a")
    for _ in range(int(STALL_SECONDS / SILENT_SECONDS)):
        run.liveness.beat(0, drawn=0, failed=0, ticks=0)
        assert run.look(SILENT_SECONDS) is None
    for _ in range(3):
        run.liveness.beat(0, drawn=0, failed=0, ticks=0)
        reason = run.look(SILENT_SECONDS)
    assert reason == "no progress for 30 minutes: no tick, image or receipt"


def test_an_actor_of_a_node_that_is_gone_may_wait_longer_for_another_node(run):
    run.liveness.begin(0, "a")
    run.nodes = {"b"}
    assert run.look(0) is None
    assert run.look(STALL_SECONDS) is None
    assert "no progress for 30 minutes" in run.look(1)


@pytest.mark.parametrize("step", ["loads", "writes"])
def test_silence_is_no_fault_while_an_actor_loads_or_nothing_is_drawn(run, step):
    run.liveness.begin(0, "a")
    if step == "loads":  # again, as its process died
        run.liveness.loading()
    else:
        run.liveness.end(0, drawn=2, failed=0)
    assert run.look(0) is None
    assert run.look(STALL_SECONDS) is None
    assert run.look(0, receipts=1) is None
    assert run.look(STALL_SECONDS) is None


def test_silence_counts_from_the_last_message(run):
    run.liveness.begin(0, "a")
    assert run.look(0) is None
    assert run.look(SILENT_SECONDS - 1) is None
    run.liveness.beat(0, drawn=0, failed=0, ticks=0)
    assert run.look(SILENT_SECONDS - 1) is None
    assert run.look(SILENT_SECONDS + 1) is not None


def test_a_cluster_that_grows_may_have_no_node_for_as_long_as_it_takes(make_job, monkeypatch):
    machines = stall.ray_setup.Machines(())
    monkeypatch.setattr(stall.ray_setup, "machines", lambda labels: machines)
    run = Run(make_job(cluster={"actors": {"min": 0, "max": 2}}, engine={"device": "cuda"}))
    assert run.look(0) is None
    assert run.look(100 * STALL_SECONDS) is None
    machines = stall.ray_setup.Machines((stall.ray_setup.Machine(cpus=4, gpus=1),))
    assert "no progress" in run.look(1)

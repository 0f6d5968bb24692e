"""The signs of life that a run gives, and that it notices when it does not own its output."""

import os
import uuid

import fsspec
import pytest

from sdbatch.output import lease, names
from sdbatch.output.progress import Progress, read_heartbeat
from sdbatch.output.pulse import Pulse
from sdbatch.storage import Store
from tests.wait import wait_until

PROGRESS = Progress(planned=9, drawn=3, failed=1, images_per_s=0.5, step="")


@pytest.fixture
def held(tmp_path):
    return lease.take(Store(str(tmp_path / "out")))


def follow(held):
    """Let another run take the output, as if the process of the first one were gone."""
    held.store.put(
        names.run_file(held.run.number),
        held.store.read(names.run_file(held.run.number)).replace(
            b'"pid":%d' % os.getpid(), b'"pid":%d' % 2**30
        ),
    )
    return lease.take(held.store)


def test_a_pulse_writes_the_heartbeat_of_its_run_and_releases_the_lease_at_the_end(held):
    pulse = Pulse(held)
    wait_until(lambda: read_heartbeat(held.store))
    first = read_heartbeat(held.store)
    assert (first.run, first.state, first.every) == (held.run.id, "running", 2.0)
    pulse.update(PROGRESS)
    pulse.end("finished")
    last = read_heartbeat(held.store)
    assert last.beat > first.beat
    assert (last.run, last.state, last.progress) == (held.run.id, "finished", PROGRESS)
    assert lease.newest_run(held.store).ended == "finished"
    assert pulse.lost is None


def test_a_pulse_beats_again_and_again(held):
    pulse = Pulse(held)
    wait_until(lambda: (beat := read_heartbeat(held.store)) and beat.beat >= 2)
    pulse.end("stopped")


def test_a_pulse_beats_less_often_on_a_remote_output():
    store = Store(f"memory://{uuid.uuid4().hex}")
    pulse = Pulse(lease.take(store))
    pulse.end("stopped")
    assert read_heartbeat(store).every == 5.0
    assert lease.newest_run(store).ended == "stopped"
    fsspec.filesystem("memory").rm(store.url, recursive=True)


def test_a_pulse_that_has_ended_says_nothing_more(held):
    pulse = Pulse(held)
    pulse.end("finished")
    pulse.update(PROGRESS)
    pulse.end("stopped")
    assert read_heartbeat(held.store).state == "finished"
    assert lease.newest_run(held.store).ended == "finished"


def test_a_pulse_notices_that_another_run_took_over_and_writes_nothing_more(held):
    pulse = Pulse(held)
    wait_until(lambda: read_heartbeat(held.store))
    second = follow(held)
    wait_until(lambda: pulse.lost)
    assert f"{second.run.describe()} owns it now" in pulse.lost
    pulse.update(PROGRESS)
    pulse.end("stopped")
    assert read_heartbeat(held.store).state == "running"
    assert read_heartbeat(held.store).progress != PROGRESS
    assert lease.newest_run(held.store) == second.run


def test_a_pulse_notices_that_its_output_was_moved_away_and_makes_no_new_one(held, tmp_path):
    pulse = Pulse(held)
    wait_until(lambda: read_heartbeat(held.store))
    os.rename(held.store.url, tmp_path / "moved")
    pulse.end("stopped")
    assert "it was moved away or emptied" in pulse.lost
    assert not os.path.exists(held.store.url)
    assert read_heartbeat(Store(str(tmp_path / "moved"))).state == "running"


def test_a_pulse_goes_on_when_the_store_fails(held, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full_disk)
        pulse = Pulse(held)
        pulse.update(PROGRESS)
    wait_until(lambda: read_heartbeat(held.store))
    pulse.end("finished")
    assert pulse.lost is None
    assert lease.newest_run(held.store).ended == "finished"


def full_disk(*_):
    raise OSError(28, "No space left on device")

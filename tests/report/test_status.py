"""The state of an output, as anyone who can read it sees it."""

import json
import os
from dataclasses import asdict, replace

import pytest

from sdbatch.errors import StorageError
from sdbatch.output import lease, names
from sdbatch.output.lease import Run
from sdbatch.output.progress import Heartbeat, Progress, write_heartbeat
from sdbatch.report.status import read_status, watch_run
from sdbatch.storage import Store
from tests.finished import finish, small_job

PROGRESS = Progress(planned=6, drawn=3, failed=1, images_per_s=0.5, step="")
REASON = "ValueError: this prompt cannot be drawn"
EVERY = 0.02  # seconds between heartbeats: a run that is gone is noticed at once


@pytest.fixture
def complete(make_job, tmp_path):
    """An output with all its receipts: 6 images in 3 shards, 2 failed."""
    return finish(small_job(make_job, tmp_path))


@pytest.fixture
def partial(complete):
    """An output whose last shard has no receipt."""
    complete.store.remove(names.receipt_file(2))
    return complete


def put_run(store, run):
    """Write the file of a run, as another machine or a process that is over wrote it."""
    store.put(names.run_file(run.number), json.dumps(asdict(run)).encode())
    return run


def other_run(store, **changes):
    """Let a run of another machine own the output."""
    run = Run(2, "000002-abcdef01", "elsewhere", 12, "elsewhere:12-34", "2026-11-28T20:00:00Z")
    return put_run(store, replace(run, **changes))


def beat(store, run, number=1, state="running"):
    write_heartbeat(store, Heartbeat(run.id, number, state, EVERY, PROGRESS))


class Beating(Store):
    """An output whose run writes its heartbeat whenever someone looks at it."""

    def __init__(self, url, run):
        super().__init__(url)
        self._run = run
        self._number = 0

    def read_if_exists(self, name):
        if name == names.PROGRESS:
            self._number += 1
            beat(self, self._run, self._number)
        return super().read_if_exists(name)


def test_status_counts_committed_images(partial):
    status = read_status(partial.store)

    assert (status.planned, status.images, status.failed) == (6, 2, 2)
    assert (status.shards, status.shards_committed) == (3, 2)
    assert status.reasons == {REASON: 2}
    assert status.output == partial.store.url


@pytest.mark.parametrize("end", ["finished", "stopped", "failed"])
def test_status_is_finished_when_every_shard_has_its_receipt(end, complete):
    lease.take(complete.store).release(end)

    assert read_status(complete.store).state == "finished"


def test_status_is_finished_when_the_last_run_died_after_the_last_receipt(complete):
    other_run(complete.store)

    assert read_status(complete.store).state == "finished"


def test_status_is_running_while_the_process_of_a_run_of_this_machine_lives(partial):
    held = lease.take(partial.store)

    assert read_status(partial.store).state == "running"
    assert read_status(partial.store).run == held.run


def test_status_is_gone_when_the_process_of_a_run_of_this_machine_is_over(partial):
    run = lease.take(partial.store).run
    put_run(partial.store, replace(run, process=f"{run.process}0"))  # a later process has its pid
    beat(partial.store, run)

    assert (read_status(partial.store).state, read_status(partial.store).exit_code) == ("gone", 1)


@pytest.mark.parametrize("began", ["1970-01-01T00:00:00Z", "2099-01-01T00:00:00Z"])
def test_status_is_running_when_a_run_of_another_machine_beats_whatever_its_clock_says(
    began, partial
):
    run = other_run(partial.store, began=began)
    status = read_status(Beating(partial.store.url, run))

    assert (status.state, status.run, status.progress) == ("running", run, PROGRESS)


@pytest.mark.parametrize("hours", [-5, 0, 5])
def test_status_is_gone_when_a_run_of_another_machine_does_not_beat(hours, partial):
    """A heartbeat that lies there says nothing, whatever the time of its file is."""
    run = other_run(partial.store)
    beat(partial.store, run)
    path = partial.folder / names.PROGRESS
    at = path.stat().st_mtime + 3600 * hours
    os.utime(path, (at, at))

    assert read_status(partial.store).state == "gone"


@pytest.mark.usefixtures("_fast_watch")
def test_status_is_gone_when_the_run_died_before_its_first_heartbeat(partial):
    run = other_run(partial.store)
    status = read_status(partial.store)

    assert (status.state, status.run, status.progress) == ("gone", run, None)


@pytest.mark.usefixtures("_fast_watch")
def test_status_has_no_progress_of_an_earlier_run(partial):
    beat(partial.store, lease.newest_run(partial.store))
    other_run(partial.store)

    assert read_status(partial.store).progress is None


def test_status_is_running_when_all_shards_are_committed_but_the_run_has_not_ended(complete):
    lease.take(complete.store)

    assert read_status(complete.store).state == "running"


@pytest.mark.parametrize("end", ["finished", "stopped", "failed"])
def test_status_is_stopped_when_the_last_run_ended_but_a_receipt_is_missing(end, partial):
    lease.take(partial.store).release(end)

    assert (read_status(partial.store).state, read_status(partial.store).exit_code) == (
        "stopped",
        1,
    )


def test_status_is_stopped_when_the_last_heartbeat_of_the_run_is_its_farewell(partial):
    """The process of a run may live on, in Python for example."""
    beat(partial.store, lease.take(partial.store).run, state="stopped")

    assert read_status(partial.store).state == "stopped"


def test_status_is_gone_when_nothing_says_which_run_was_the_last(partial):
    partial.store.remove(names.run_file(1))
    status = read_status(partial.store)

    assert (status.state, status.run) == ("gone", None)


def test_status_raises_when_there_is_no_output(tmp_path):
    with pytest.raises(StorageError, match=r"no job\.yaml: must be the output of a job"):
        read_status(Store(str(tmp_path / "nothing")))


def test_status_raises_when_the_plan_is_damaged(complete):
    complete.store.put(names.PLAN, b"PAR1")

    with pytest.raises(StorageError, match=r"plan\.parquet = missing or damaged.*Run the job"):
        read_status(complete.store)


GARBAGE = (b"", b"{", b"[]", b"\xff", b"null", b'{"state": "runn', b"{}")


@pytest.mark.parametrize("data", GARBAGE)
def test_status_does_not_count_a_shard_whose_receipt_is_damaged(data, complete):
    complete.store.put(names.receipt_file(0), data)
    status = read_status(complete.store)

    assert (status.state, status.shards_committed) == ("stopped", 2)
    assert status.images + status.failed == 4


@pytest.mark.usefixtures("_fast_watch")
@pytest.mark.parametrize("data", GARBAGE)
def test_status_does_without_a_heartbeat_that_is_damaged(data, partial):
    partial.store.put(names.PROGRESS, data)
    assert read_status(partial.store).state == "stopped"

    run = other_run(partial.store)
    status = read_status(partial.store)
    assert (status.state, status.run, status.progress) == ("gone", run, None)


@pytest.mark.parametrize("data", GARBAGE)
def test_status_treats_a_run_whose_file_is_damaged_as_over(data, partial):
    partial.store.put(names.run_file(2), data)

    assert read_status(partial.store).state == "stopped"


def test_status_text_has_the_progress_and_the_rate_while_a_run_draws(partial):
    run = lease.take(partial.store).run
    beat(partial.store, run)
    first, second, third, fourth, *rest = read_status(partial.store).text().splitlines()

    assert first == f"{partial.store.url}: running"
    assert second == "  4 of 6 images committed, 2 failed, 2 of 3 shards"
    assert third == f"  run {run.id} (process {os.getpid()} on {run.host}, since {run.began})"
    assert fourth == "  4 images including shards in flight, 0.5 images/s, ETA 0:04"
    assert rest == [f"  2 failed: {REASON}"]


def test_status_text_has_no_rate_when_no_run_draws(complete):
    beat(complete.store, lease.newest_run(complete.store), state="finished")

    assert read_status(complete.store).text().splitlines() == [
        f"{complete.store.url}: finished",
        "  6 of 6 images committed, 2 failed, 3 of 3 shards",
        f"  2 failed: {REASON}",
    ]


class RecordingDisplay:
    """A display that records progress and then takes the next step of a run."""

    def __init__(self, *steps):
        self.history = []
        self.closed = False
        self._steps = list(steps)

    def show(self, progress):
        self.history.append(progress)
        self._steps.pop(0)()

    def close(self, report):
        self.closed = True


@pytest.fixture
def _fast_watch(monkeypatch):
    monkeypatch.setattr("sdbatch.report.status.WATCH_SECONDS", 0.01)


@pytest.mark.usefixtures("_fast_watch")
@pytest.mark.parametrize(
    ("end", "state", "code"), [("finished", "finished", 3), ("stopped", "stopped", 1)]
)
def test_watch_follows_the_heartbeat_until_the_run_ends(end, state, code, complete):
    store = complete.store
    if end == "stopped":
        store.remove(names.receipt_file(2))
    held = lease.take(store)

    def end_run():
        beat(store, held.run, 3, end)
        held.release(end)

    beat(store, held.run, 1)
    display = RecordingDisplay(lambda: beat(store, held.run, 2), end_run)
    status = watch_run(store, display)

    assert display.history == [PROGRESS, PROGRESS]
    assert display.closed
    assert (status.state, status.exit_code) == (state, code)


@pytest.mark.usefixtures("_fast_watch")
def test_watch_ends_when_the_heartbeat_ends(partial):
    run = lease.take(partial.store).run
    beat(partial.store, run)
    display = RecordingDisplay(
        lambda: put_run(partial.store, replace(run, process=f"{run.process}0"))  # it dies
    )
    status = watch_run(partial.store, display)

    assert (status.state, status.exit_code) == ("gone", 1)
    assert display.history == [PROGRESS]


def test_watch_returns_at_once_when_no_run_draws(complete):
    display = RecordingDisplay()

    assert watch_run(complete.store, display).state == "finished"
    assert display.history == []


def test_status_says_if_several_kinds_of_device_drew_the_output(complete):
    facts = {"kind": "cpu", "instructions": "AVX2", "onednn": True, "environment": {}}
    for shard, name in enumerate(("an A", "a B")):
        file = names.receipt_file(shard)
        receipt = json.loads(complete.store.read(file))
        receipt["facts"]["device"] = {"name": name, **facts}
        complete.store.put(file, json.dumps(receipt).encode())
    status = read_status(complete.store)

    assert status.devices == {"an A (AVX2)": 1, "a B (AVX2)": 1}
    assert "  2 kinds of device drew this output: 1 images by an A" in status.text()

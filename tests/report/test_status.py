"""The state of an output, as anyone who can read it sees it."""

import json
import time

import pytest

from sdbatch.errors import StorageError
from sdbatch.output import names, receipts
from sdbatch.report.progress import Heartbeat, Progress
from sdbatch.report.status import MAX_MISSED_HEARTBEATS, read_status, watch_run
from sdbatch.storage import Store
from tests.finished import finish, small_job

PROGRESS = Progress(planned=6, drawn=3, failed=1, images_per_s=0.5, step="")
REASON = "ValueError: this prompt cannot be drawn"


@pytest.fixture
def complete(make_job, tmp_path):
    """An output with all its receipts: 6 images in 3 shards, 2 failed."""
    return finish(small_job(make_job, tmp_path))


@pytest.fixture
def partial(complete):
    """An output whose last shard has no receipt."""
    receipts.remove_receipt(complete.store, complete.receipts[-1])
    return complete


def write_heartbeat(store, state, age=0.0):
    """Write a heartbeat that is `age` intervals old."""
    Heartbeat(store).write(state, PROGRESS)
    heartbeat = json.loads(store.read(names.PROGRESS))
    heartbeat["updated"] = time.time() - age * heartbeat["every"]
    store.put(names.PROGRESS, json.dumps(heartbeat).encode())


def test_status_counts_committed_images(partial):
    status = read_status(partial.store)

    assert (status.planned, status.images, status.failed) == (6, 2, 2)
    assert (status.shards, status.shards_committed) == (3, 2)
    assert status.reasons == {REASON: 2}
    assert status.output == partial.store.url


@pytest.mark.parametrize("last", ["finished", "stopped", None])
def test_status_is_finished_when_every_shard_has_its_receipt(last, complete):
    if last:
        write_heartbeat(complete.store, last)

    assert read_status(complete.store).state == "finished"


@pytest.mark.parametrize("age", [0, MAX_MISSED_HEARTBEATS - 1])
def test_status_is_running_while_the_heartbeat_is_recent(age, partial):
    write_heartbeat(partial.store, "running", age)

    assert read_status(partial.store).state == "running"


def test_status_is_running_when_all_shards_are_committed_but_the_run_has_not_ended(complete):
    write_heartbeat(complete.store, "running")

    assert read_status(complete.store).state == "running"


def test_status_is_gone_when_the_heartbeat_is_old(partial):
    write_heartbeat(partial.store, "running", MAX_MISSED_HEARTBEATS + 1)

    assert read_status(partial.store).state == "gone"


def test_status_is_gone_when_the_run_died_before_its_first_heartbeat(partial):
    assert read_status(partial.store).heartbeat is None
    assert read_status(partial.store).state == "gone"


@pytest.mark.parametrize("age", [0, 100 * MAX_MISSED_HEARTBEATS])
def test_status_is_stopped_when_the_last_heartbeat_is_stopped(age, partial):
    write_heartbeat(partial.store, "stopped", age)

    assert read_status(partial.store).state == "stopped"


def test_status_is_stopped_when_a_finished_output_lost_a_receipt(partial):
    write_heartbeat(partial.store, "finished")

    assert read_status(partial.store).state == "stopped"


def test_status_raises_when_there_is_no_output(tmp_path):
    with pytest.raises(StorageError, match=r"no job\.yaml: must be the output of a job"):
        read_status(Store(str(tmp_path / "nothing")))


def test_status_raises_when_a_receipt_is_damaged(complete):
    complete.store.put("receipts/000001.json", b"{")

    with pytest.raises(StorageError, match=r"receipts/000001\.json = not a receipt"):
        read_status(complete.store)


def test_status_raises_when_the_heartbeat_is_damaged(complete):
    complete.store.put(names.PROGRESS, b'{"state": "runn')

    with pytest.raises(StorageError, match=r"progress\.json = "):
        read_status(complete.store)


def test_status_text_has_the_progress_and_the_rate_while_a_run_draws(partial):
    write_heartbeat(partial.store, "running")
    first, second, third, *rest = read_status(partial.store).text().splitlines()

    assert first == f"{partial.store.url}: running"
    assert second == "  4 of 6 images committed, 2 failed, 2 of 3 shards"
    assert third.startswith("  4 images including shards in flight, 0.5 images/s, ETA 0:04 (")
    assert rest == [f"  2 failed: {REASON}"]


def test_status_text_has_no_rate_when_no_run_draws(complete):
    write_heartbeat(complete.store, "finished")

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
    if end == "stopped":
        receipts.remove_receipt(complete.store, complete.receipts[-1])
    write_heartbeat(complete.store, "running")
    display = RecordingDisplay(lambda: None, lambda: write_heartbeat(complete.store, end))
    status = watch_run(complete.store, display)

    assert display.history == [PROGRESS, PROGRESS]
    assert display.closed
    assert (status.state, status.exit_code) == (state, code)


@pytest.mark.usefixtures("_fast_watch")
def test_watch_ends_when_the_heartbeat_ends(partial):
    write_heartbeat(partial.store, "running")
    status = watch_run(
        partial.store,
        RecordingDisplay(
            lambda: write_heartbeat(partial.store, "running", MAX_MISSED_HEARTBEATS + 1)
        ),
    )

    assert (status.state, status.exit_code) == ("gone", 1)


def test_watch_returns_at_once_when_no_run_draws(complete):
    display = RecordingDisplay()

    assert watch_run(complete.store, display).state == "finished"
    assert display.history == []

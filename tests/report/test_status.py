"""How far an output is, as anyone who can read it sees it."""

import json
import time

import pytest

from sdbatch.errors import StorageError
from sdbatch.output import receipts
from sdbatch.report.progress import PROGRESS_FILE, Heartbeat, Progress
from sdbatch.report.status import SILENT_BEATS, status, watch
from sdbatch.storage import Store
from tests.finished import finish, small_job

SOME = Progress(planned=6, drawn=3, failed=1, images_per_s=0.5, step="")
FAULT = "ValueError: this prompt cannot be drawn"


@pytest.fixture
def complete(make_job, tmp_path):
    """An output with all its receipts: 6 images in 3 shards, 2 failed."""
    return finish(small_job(make_job, tmp_path))


@pytest.fixture
def partial(complete):
    """An output whose last shard has no receipt."""
    receipts.withdraw(complete.store, complete.receipts[-1])
    return complete


def beat(store, state, age=0.0):
    """Leave a heartbeat of `age` beats ago."""
    Heartbeat(store).write(state, SOME)
    said = json.loads(store.read(PROGRESS_FILE))
    said["updated"] = time.time() - age * said["every"]
    store.put(PROGRESS_FILE, json.dumps(said).encode())


def test_status_counts_what_receipts_prove(partial):
    found = status(partial.store)

    assert (found.planned, found.images, found.failed) == (6, 2, 2)
    assert (found.shards, found.shards_committed) == (3, 2)
    assert found.reasons == {FAULT: 2}
    assert found.output == partial.store.url


@pytest.mark.parametrize("last", ["finished", "stopped", None])
def test_status_is_finished_when_every_shard_has_its_receipt(last, complete):
    if last:
        beat(complete.store, last)

    assert status(complete.store).state == "finished"


@pytest.mark.parametrize("age", [0, SILENT_BEATS - 1])
def test_status_is_running_while_the_heart_beats(age, partial):
    beat(partial.store, "running", age)

    assert status(partial.store).state == "running"


def test_status_is_running_when_all_is_committed_but_the_run_has_not_ended_the_output(complete):
    beat(complete.store, "running")

    assert status(complete.store).state == "running"


def test_status_is_gone_when_the_heart_stopped_without_a_word(partial):
    beat(partial.store, "running", SILENT_BEATS + 1)

    assert status(partial.store).state == "gone"


def test_status_is_gone_when_the_run_died_before_its_first_heartbeat(partial):
    assert status(partial.store).heartbeat is None
    assert status(partial.store).state == "gone"


@pytest.mark.parametrize("age", [0, 100 * SILENT_BEATS])
def test_status_is_stopped_when_the_run_said_so(age, partial):
    beat(partial.store, "stopped", age)

    assert status(partial.store).state == "stopped"


def test_status_is_stopped_when_a_finished_output_lost_a_receipt(partial):
    beat(partial.store, "finished")

    assert status(partial.store).state == "stopped"


def test_status_raises_when_there_is_no_output(tmp_path):
    with pytest.raises(StorageError, match=r"no job\.yaml: must be the output of a job"):
        status(Store(str(tmp_path / "nothing")))


def test_status_raises_when_a_receipt_is_damaged(complete):
    complete.store.put("receipts/000001.json", b"{")

    with pytest.raises(StorageError, match=r"receipts/000001\.json = no receipt"):
        status(complete.store)


def test_status_raises_when_the_heartbeat_is_damaged(complete):
    complete.store.put(PROGRESS_FILE, b'{"state": "runn')

    with pytest.raises(StorageError, match=r"progress\.json = "):
        status(complete.store)


def test_status_tells_people_how_far_and_how_fast_while_it_runs(partial):
    beat(partial.store, "running")
    first, second, third, *rest = status(partial.store).text().splitlines()

    assert first == f"{partial.store.url}: running"
    assert second == "  4 of 6 images committed, 2 failed, 2 of 3 shards"
    assert third.startswith("  4 images with those in flight, 0.5 images/s, ETA 0:04 (")
    assert rest == [f"  2 failed: {FAULT}"]


def test_status_tells_people_no_pace_when_nothing_runs(complete):
    beat(complete.store, "finished")

    assert status(complete.store).text().splitlines() == [
        f"{complete.store.url}: finished",
        "  6 of 6 images committed, 2 failed, 3 of 3 shards",
        f"  2 failed: {FAULT}",
    ]


class Seen:
    """A display that goes on with the run each time it is shown."""

    def __init__(self, *steps):
        self.shown = []
        self.closed = False
        self._steps = list(steps)

    def show(self, progress):
        self.shown.append(progress)
        self._steps.pop(0)()

    def close(self, report):
        self.closed = True


@pytest.fixture
def _impatient(monkeypatch):
    monkeypatch.setattr("sdbatch.report.status.WATCH_SECONDS", 0.01)


@pytest.mark.usefixtures("_impatient")
@pytest.mark.parametrize(
    ("end", "state", "code"), [("finished", "finished", 3), ("stopped", "stopped", 1)]
)
def test_watch_follows_the_heartbeat_until_the_run_is_over(end, state, code, complete):
    if end == "stopped":
        receipts.withdraw(complete.store, complete.receipts[-1])
    beat(complete.store, "running")
    seen = Seen(lambda: None, lambda: beat(complete.store, end))
    found = watch(complete.store, seen)

    assert seen.shown == [SOME, SOME]
    assert seen.closed
    assert (found.state, found.exit_code) == (state, code)


@pytest.mark.usefixtures("_impatient")
def test_watch_ends_when_the_run_falls_silent(partial):
    beat(partial.store, "running")
    found = watch(partial.store, Seen(lambda: beat(partial.store, "running", SILENT_BEATS + 1)))

    assert (found.state, found.exit_code) == ("gone", 1)


def test_watch_shows_at_once_how_an_output_is_that_nobody_draws(complete):
    seen = Seen()

    assert watch(complete.store, seen).state == "finished"
    assert seen.shown == []

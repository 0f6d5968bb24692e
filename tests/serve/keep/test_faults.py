"""`serve.keep` when its process is killed, its store fails, or a file in it is damaged."""

import hashlib
import itertools
import json
import threading
import uuid

import pytest

from sdbatch.errors import StorageError
from sdbatch.serve import jobs, keep
from sdbatch.storage import Store
from tests.serve.conftest import (
    PHOTO,
    SECONDS,
    PausedEngine,
    Recorder,
    file_of,
)
from tests.serve.keep.conftest import (
    JOBS,
    begin,
    end_of,
    files_of,
    maintain,
    poll,
)
from tests.wait import wait_until


class Fault:
    """Lets the store fail as if the process was killed: after some writes none arrives."""

    def __init__(self, monkeypatch, writes):
        self.left = writes
        self.error = "killed"
        for name in ("put", "create", "remove"):
            monkeypatch.setattr(Store, name, self._limited(getattr(Store, name)))

    def _limited(self, method):
        def limited(store, name, *data):
            self.left -= 1
            if self.left < 0:
                raise StorageError(f"{store.where(name)} = {self.error}")
            return method(store, name, *data)

        return limited


@pytest.mark.parametrize("writes", range(10))
def test_a_kill_before_any_write_loses_no_accepted_job(folder, front, monkeypatch, writes):
    """The writes of each job: two, then its image, its end and the removal of its pictures."""
    first = front(folder, maintained=False)
    with monkeypatch.context() as patch:
        fault = Fault(patch, writes)
        picture = {"image": file_of(PHOTO)}
        answers = [
            first.client.post(JOBS, data={"prompt": "a", "strength": "1"}, files=picture)
            for _ in range(2)
        ]
        wait_until(lambda: fault.left < 0 or first.service.queue.pending == 0)
        first.close()
    accepted = [answer.json()["id"] for answer in answers if answer.status_code == 202]
    assert all(answer.status_code in (202, 503) for answer in answers)
    second = front(folder, Recorder())
    for name in accepted:
        state = end_of(second, f"{JOBS}/{name}")
        assert state["status"] == "completed"
        assert len(state["result"]["data"]) == 1
    assert writes < 2 or accepted


def test_while_the_store_fails_a_request_ends_with_a_retryable_error_and_nothing_is_lost(
    place, front, monkeypatch, caplog
):
    engine = PausedEngine()
    server = front(place, engine, maintained=False)
    job = begin(server, seed=1)
    engine.wait_for(waiting=1)
    with monkeypatch.context() as patch:
        fault = Fault(patch, 0)
        fault.error = "No space left on device: must be reachable and have space left."
        engine.draw_all()
        refused = server.post(JOBS, prompt="a")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "store_unavailable")
        assert int(refused.headers["retry-after"]) >= 1
        assert "The store of the service (serve.keep) cannot be written" in refused.text
        assert str(place) not in refused.text
        assert "No space left on device" in caplog.text
        cancelled = server.post(f"{job}/cancel")
        assert cancelled.status_code == 503
        assert poll(server, job)["status"] == "queued"
        assert server.service.queue.pending == 1  # the image waits in memory
    assert end_of(server, job)["status"] == "completed"
    server.wait_for_pending(0)


def test_an_image_by_url_that_cannot_be_stored_ends_with_a_retryable_error(
    folder, front, monkeypatch
):
    server = front(folder, maintained=False)
    with monkeypatch.context() as patch:
        Fault(patch, 0)
        answer = server.post(prompt="a", response_format="url")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "store_unavailable")
    assert server.post(prompt="a", response_format="url").status_code == 200
    assert server.post(prompt="a").status_code == 200


def test_a_store_that_does_not_answer_blocks_no_other_request(folder, front, monkeypatch):
    server = front(folder, maintained=False)
    answers, written = threading.Event(), threading.Semaphore(0)
    put = Store.put

    def wait(store, name, data):
        assert answers.wait(SECONDS)
        put(store, name, data)
        written.release()

    monkeypatch.setattr(keep, "ANSWER_SECONDS", 0.2)
    monkeypatch.setattr(Store, "put", wait)
    for _ in range(3):
        assert server.post(JOBS, prompt="a").status_code == 503
    assert server.post(prompt="a").status_code == 200
    assert server.service.queue.pending == 0
    answers.set()
    assert all(written.acquire(timeout=SECONDS) for _ in range(3))
    # what arrives too late is removed: its client was told that it was not accepted
    wait_until(lambda: files_of(folder) == [])


def damage(file, how):
    data = file.read_bytes()
    if how == "removed":
        file.unlink()
    elif callable(how):
        file.write_bytes(how(data))
    else:
        file.write_bytes(data[: len(data) // 2] if how == "truncated" else how)


def encrypted(data):
    """Return a zip file that says of its first member that it is encrypted."""
    flags = data.index(b"PK\x01\x02") + 8
    return data[:flags] + bytes([data[flags] | 1]) + data[flags + 1 :]


@pytest.mark.parametrize(
    ("suffix", "how"),
    [
        *itertools.product([".json", ".pictures", ".end.json"], ["truncated", b"null"]),
        (".pictures", encrypted),
    ],
)
def test_a_job_with_a_damaged_file_is_lost_alone(folder, front, caplog, suffix, how):
    engine = PausedEngine()
    first = front(folder, engine, maintained=False)
    answer = first.client.post(JOBS, data={"prompt": "a"}, files={"image": file_of(PHOTO)})
    damaged, other = f"{JOBS}/{answer.json()['id']}", begin(first)
    engine.wait_for(waiting=2)
    if suffix == ".end.json":
        engine.draw_all()
        first.wait_for_pending(0)
    first.close()
    name = damaged.rpartition("/")[2]
    damage(folder / "jobs" / f"{name}{suffix}", how)
    second = front(folder)
    assert end_of(second, other)["status"] == "completed"
    answer = second.client.get(damaged)
    assert (answer.status_code, answer.json()["error"]["code"]) == (410, "job_lost")
    assert "is damaged in the store of the service. Start it again." in answer.text
    assert second.post(f"{damaged}/cancel").status_code == 410
    assert name not in caplog.text


@pytest.mark.parametrize("how", ["truncated", "removed", b"another file"])
def test_a_completed_job_whose_image_is_damaged_is_lost(folder, front, how):
    first = front(folder)
    job = begin(first)
    end_of(first, job)
    [image] = (folder / "jobs").glob("*.png")
    damage(image, how)
    answer = front(folder).client.get(job)
    assert (answer.status_code, answer.json()["error"]["code"]) == (410, "job_lost")


def test_a_record_cannot_name_a_file_outside_of_its_folder(folder, front):
    server = front(folder)
    job = begin(server)
    end_of(server, job)
    [file] = (folder / "jobs").glob("*.end.json")
    record = json.loads(file.read_bytes())
    [image] = record["images"]
    image["file"] = "../secret.png"
    image["facts"]["sha256"] = hashlib.sha256(b"secret").hexdigest()
    file.write_text(json.dumps(record))
    (folder / "secret.png").write_bytes(b"secret")
    assert server.client.get(job).status_code == 410


def test_a_job_that_was_accepted_for_another_model_is_not_drawn_by_this_one(folder, front):
    engine = PausedEngine()
    first = front(folder, engine)
    job = begin(first)
    first.close()
    [file] = (folder / "jobs").iterdir()
    record = json.loads(file.read_bytes())
    record["encoding"]["model_hash"] = "another"
    file.write_text(json.dumps(record))
    engine = Recorder()
    answer = front(folder, engine).client.get(job)
    assert (answer.status_code, answer.json()["error"]["code"]) == (410, "model_changed")
    assert engine.requests == []


def test_what_a_killed_process_was_writing_is_removed(folder, front, monkeypatch):
    monkeypatch.setattr(jobs, "MAINTENANCE_SECONDS", 0.05)
    monkeypatch.setattr(keep, "WRITE_SECONDS", 0.1)
    server = front(folder, maintained=False)
    torn = [folder / name / f".{uuid.uuid4().hex}.tmp" for name in ("images", "jobs")]
    foreign = folder / "jobs" / "notes.txt"
    for file in (*torn, foreign):
        file.write_bytes(b"a prompt")
    maintain(server)
    wait_until(lambda: not any(file.exists() for file in torn))
    assert foreign.exists()

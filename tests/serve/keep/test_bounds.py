"""`serve.keep` for a limited time and up to some bytes."""

import asyncio
import json
import time

import numpy as np
import pytest

from tests.fakes import FakeEngine
from tests.serve.conftest import (
    PausedEngine,
    Recorder,
)
from tests.serve.keep.conftest import (
    begin,
    end_of,
    files_of,
    maintain,
    poll,
)
from tests.wait import wait_until


@pytest.fixture
def clock(monkeypatch):
    """Let time pass for the names of jobs and images."""

    class Clock:
        seconds = 0.0

        def time(self):
            return time.time() + self.seconds

        def time_ns(self):
            return time.time_ns() + int(self.seconds * 1e9)

        def __getattr__(self, name):
            return getattr(time, name)

    clock = Clock()
    for module in ("sdbatch.serve.keep", "sdbatch.serve.kept_jobs"):
        monkeypatch.setattr(f"{module}.time", clock)
    return clock


def all_files(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_what_has_expired_is_removed_by_the_next_process(folder, front, clock):
    engine = PausedEngine()
    first = front(folder, engine, maintained=False)
    drawn = begin(first)
    by_url = begin(first, response_format="url")
    engine.wait_for(waiting=2)
    engine.draw_all()
    url = end_of(first, by_url)["result"]["data"][0]["url"].removeprefix(first.url)
    end_of(first, drawn)
    unfinished = begin(first)
    engine.wait_for(waiting=1)
    first.close()
    clock.seconds = 3590
    assert [poll(front(folder, maintained=False), job)["status"] for job in (drawn, by_url)] == [
        "completed"
    ] * 2
    clock.seconds = 3700
    second = front(folder, Recorder(), maintained=False)
    for path in (drawn, by_url, unfinished, url):
        assert second.client.get(path).status_code == 404
    assert len(all_files(folder)) == 7
    maintain(second)
    wait_until(lambda: all_files(folder) == [])


def test_a_job_is_kept_for_its_time_after_its_end_and_not_after_its_acceptance(
    folder, front, clock
):
    engine = PausedEngine()
    first = front(folder, engine, maintained=False)
    job = begin(first)
    engine.wait_for(waiting=1)
    clock.seconds = 3700  # for the store, but the end is of now
    assert poll(first, job)["status"] == "queued"
    asyncio.run(first.service.jobs.stored.remove_expired(frozenset([job.rpartition("/")[2]])))
    assert files_of(folder, job) == [".json"]


def end_later(folder, seconds):
    """Let the jobs of a store have ended later."""
    for file in (folder / "jobs").glob("*.end.json"):
        record = json.loads(file.read_bytes())
        record["at"] += seconds
        file.write_text(json.dumps(record))


def test_an_old_job_that_ended_late_is_still_polled(folder, front, clock):
    first = front(folder, maintained=False)
    job = begin(first)
    end_of(first, job)
    end_later(folder, 300)
    clock.seconds = 3700
    second = front(folder)
    wait_until(lambda: second.service.jobs.stored._ended_at)  # its record was read for the time
    assert poll(second, job)["status"] == "completed"


NOISE = np.random.default_rng(1).integers(0, 256, (64, 512, 3), np.uint8)


class Noisy(FakeEngine):
    """Draws 100 KiB in PNG."""

    def _draw(self, request):
        drawn = super()._draw(request)
        return type(drawn)(
            **{name: getattr(drawn, name) for name in drawn.__slots__}
            | {"image": np.roll(NOISE, request.seed, 1)}
        )


def size_of(folder):
    return sum(path.stat().st_size for path in folder.iterdir())


def test_the_oldest_images_and_ended_jobs_are_evicted_before_there_is_too_much(folder, front):
    server = front(folder, Noisy(), keep_mib=1, maintained=False)
    urls, accepted = [], []
    for seed in range(16):
        answer = server.post(prompt="a", seed=seed, response_format="url").json()
        urls.append(answer["data"][0]["url"])
        accepted.append(begin(server, seed=seed))
        end_of(server, accepted[-1])
        assert size_of(folder / "images") <= 2**20
        assert size_of(folder / "jobs") <= 2**20
    for paths in (urls, accepted):
        statuses = [server.client.get(path).status_code for path in paths]
        assert statuses == sorted(statuses, reverse=True)  # 404 of the oldest
        assert (statuses[0], statuses[-1], set(statuses)) == (404, 200, {200, 404})


def test_eviction_spares_jobs_that_are_not_drawn_yet(folder, front):
    class Waits(Noisy):
        def __init__(self):
            super().__init__()
            self.waiting = PausedEngine()

        def submit(self, request, **options):
            engine = self.waiting if request.prompt == "wait" else super()
            return engine.submit(request, **options)

    engine = Waits()
    server = front(folder, engine, keep_mib=1)
    job = begin(server, prompt="wait")
    for seed in range(16):
        end_of(server, begin(server, seed=seed))
    engine.waiting.draw_all()
    assert end_of(server, job)["status"] == "completed"

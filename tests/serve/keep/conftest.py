"""A service on a store, as a Front has it; for the tests of `serve.keep`."""

import asyncio
import uuid

import fsspec
import pytest

from sdbatch.job import Serve
from sdbatch.serve import jobs, keep
from tests.fakes import FakeEngine
from tests.wait import wait_until

JOBS = "/v1/images/jobs"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Try a store that failed again at once."""
    monkeypatch.setattr(jobs, "RETRY_SECONDS", 0.05)


@pytest.fixture(params=["folder", "memory"])
def place(request, tmp_path):
    """The store: a local folder, or an object store in memory."""
    if request.param == "folder":
        yield str(tmp_path / "kept")
        return
    url = f"memory://{uuid.uuid4().hex}"
    yield url
    with_files = fsspec.filesystem("memory")
    if with_files.exists(url):
        with_files.rm(url, recursive=True)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "kept"


@pytest.fixture
def front(serving):
    """Start a service on a store as a Front does, one after the other or at the same time."""

    def start(place, engine=None, maintained=True, **settings):
        keep.prepare(Serve(keep=str(place)))
        server = serving(engine or FakeEngine(), serve={"keep": str(place), **settings})
        if maintained:
            maintain(server)
        return server

    return start


def maintain(server):
    return asyncio.run_coroutine_threadsafe(server.service.jobs.maintain(), server._loop)


def begin(server, **body):
    """Begin a long job; return its path."""
    answer = server.post(JOBS, **{"prompt": "a", **body})
    assert answer.status_code == 202, answer.text
    return f"{JOBS}/{answer.json()['id']}"


def poll(server, job):
    answer = server.client.get(job)
    assert answer.status_code == 200, answer.text
    return answer.json()


def end_of(server, job):
    """Wait until a job has ended; return its state."""
    wait_until(lambda: poll(server, job)["status"] not in ("queued", "drawing"))
    return poll(server, job)


def files_of(folder, job=""):
    """Return the suffixes of a job's files."""
    name = job.rpartition("/")[2]
    return sorted(
        file.name.removeprefix(name) for file in (folder / "jobs").iterdir() if name in file.name
    )

"""The heartbeat in progress.json: read as it was written, and never in part."""

import json

import pytest

from sdbatch.output import names
from sdbatch.output.progress import Heartbeat, Progress, read_heartbeat, write_heartbeat
from sdbatch.storage import Store

PROGRESS = Progress(planned=9, drawn=3, failed=1, images_per_s=0.5, step="loading the model")
HEARTBEAT = Heartbeat("000001-0123abcd", 7, "running", 2.0, PROGRESS)


@pytest.fixture
def store(tmp_path):
    store = Store(str(tmp_path))
    assert read_heartbeat(store) is None
    write_heartbeat(store, HEARTBEAT)
    return store


def test_a_heartbeat_is_read_as_it_was_written(store):
    assert read_heartbeat(store) == HEARTBEAT


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"{}", b"\xff", bytes(100), b"[" * 100_000]
)
def test_a_heartbeat_that_is_garbage_reads_as_none(store, content):
    store.put(names.PROGRESS, content)
    assert read_heartbeat(store) is None


@pytest.mark.parametrize(
    "change",
    [
        {"beat": "7"},
        {"beat": None},
        {"run": 1},
        {"state": "unknown"},
        {"every": "2"},
        {"progress": None},
        {"progress": {"planned": 9}},
        {"more": 1},
    ],
)
def test_a_heartbeat_that_says_something_else_reads_as_none(store, change):
    written = json.loads(store.read(names.PROGRESS))
    store.put(names.PROGRESS, json.dumps({**written, **change}).encode())
    assert read_heartbeat(store) is None

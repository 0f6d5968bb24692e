"""A Store on S3, Azure and Google Cloud Storage: the same tests for each, with a real server."""

import asyncio
import multiprocessing
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from sdbatch.errors import StorageError
from sdbatch.storage import Store
from tests.stores import servers

ONE_REQUEST = 6_000_000  # bytes that are uploaded in one request
PARTS = 110 * 2**20  # bytes that every store uploads in parts
OLD = b"old"


@pytest.fixture
def store(place, request):
    """A folder of its own for each test."""
    return Store(f"{place.url}/{request.node.originalname}")


@pytest.fixture
def _no_waits(monkeypatch):
    """Let clients repeat failed requests at once."""
    sleep = asyncio.sleep
    monkeypatch.setattr(asyncio, "sleep", lambda *_, **__: sleep(0))


def test_store_puts_lists_reads_and_removes(store):
    assert store.read_if_exists("data/a") is None
    assert store.names("data") == {}
    store.put("data/a", b"x" * ONE_REQUEST)
    assert store.read("data/a") == b"x" * ONE_REQUEST
    assert store.names("data") == {"a": ONE_REQUEST}
    store.put("data/a", b"")
    assert (store.read("data/a"), store.read_if_exists("data/a")) == (b"", b"")
    assert store.names("data") == {"a": 0}
    store.remove("data/a")
    store.remove("data/a")
    assert store.names("data") == {}


def test_names_are_the_files_of_one_folder_including_hidden_ones(store):
    names = "job.yaml", ".hidden.tmp", "data/a", "data/.b", "data/x/deep", "data2/c", "data.d"
    for name in names:
        store.put(name, b"1234")
    assert store.names() == {"job.yaml": 4, ".hidden.tmp": 4, "data.d": 4}
    assert store.names("data") == {"a": 4, ".b": 4}
    assert store.names("dat") == {}
    assert store.names("data/a") == store.names("data/a/deeper") == {}


@pytest.mark.slow
def test_names_of_a_large_folder_are_complete(store):
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda i: store.put(f"data/{i:06}", b"1"), range(1100)))
    assert len(store.names("data")) == 1100  # servers list 1,000 at once


def test_an_object_that_marks_a_folder_is_no_file(place, store):
    store.put("data/a", b"1")
    place.mark_folder(f"{store.url}/data")
    assert store.names() == {}
    assert store.names("data") == {"a": 1}


def test_a_whole_bucket_can_be_the_store(place):
    store = Store(f"{place.url}/")
    store.put("at-the-top", b"12")
    assert store.read("at-the-top") == b"12"
    assert store.names()["at-the-top"] == 2
    store.remove("at-the-top")
    assert "at-the-top" not in store.names()


def test_what_another_process_writes_is_seen_at_once(store):
    other = pickle.loads(pickle.dumps(store))
    with multiprocessing.get_context("spawn").Pool(1) as process:
        assert store.names("data") == {}
        process.apply(other.put, ("data/a", b"1"))
        assert store.names("data") == {"a": 1}
        process.apply(other.put, ("data/a", b"longer"))
        assert store.read("data/a") == b"longer"
        with store.open("data/a") as file:
            assert file.read() == b"longer"
        assert store.names("data") == {"a": 6}
        process.apply(other.remove, ("data/a",))
        assert store.names("data") == {}
        assert store.read_if_exists("data/a") is None


def test_open_reads_at_any_position(store):
    store.put("a", bytes(range(256)) * 40_000)
    with store.open("a") as file:
        assert file.seek(0, 2) == 256 * 40_000
        file.seek(-3, 2)
        assert file.read() == bytes([253, 254, 255])
        file.seek(256 * 100 + 7)
        assert file.read(2) == bytes([7, 8])


def test_of_two_creators_the_first_writes(store):
    assert store.create("lease", b"first")
    assert not store.create("lease", b"second")
    assert store.read("lease") == b"first"
    store.remove("lease")
    assert store.create("lease", b"third")


def create(store, name):
    return name if store.create("lease", name) else None


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_of_creators_that_race_one_writes(store, kind):
    names = [f"creator {i}".encode() for i in range(24)]
    if kind == "threads":
        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(create, [store] * len(names), names))
    else:
        with multiprocessing.get_context("spawn").Pool(4) as pool:
            results = pool.starmap(create, [(store, name) for name in names], chunksize=1)
    winners = [name for name in results if name]
    assert winners == [store.read("lease")]
    store.remove("lease")


@pytest.mark.usefixtures("_no_waits")
@pytest.mark.parametrize("size", [ONE_REQUEST, pytest.param(PARTS, marks=pytest.mark.slow)])
def test_put_whose_connection_breaks_leaves_the_old_object(place, store, size):
    store.put("a", OLD)
    for name in ("a", "b"):
        with (
            place.proxy.breaks_after(size // 2),
            pytest.raises(StorageError, match=rf"{store.url}/{name} = .*must be reachable"),
        ):
            store.put(name, bytes(size))
        assert store.names() == {"a": len(OLD)}
    assert store.read("a") == OLD
    store.put("a", bytes(size))
    assert store.names() == {"a": size}


@pytest.mark.parametrize("size", [ONE_REQUEST, PARTS])
def test_put_whose_process_is_killed_leaves_the_old_object(place, store, size):
    store.put("a", OLD)
    script = f"from sdbatch.storage import Store; Store({store.url!r}).put('a', bytes({size}))"
    with place.proxy.breaks_after(size // 2):
        process = subprocess.Popen([sys.executable, "-c", script])
        assert place.proxy.broken.wait(60)
        process.kill()
        process.wait()
    assert store.names() == {"a": len(OLD)}
    assert store.read("a") == OLD


def test_a_missing_object_is_named_with_the_way_out(store):
    for use in (store.read, store.open):
        with pytest.raises(
            StorageError, match=rf"^{store.url}/b = .*be there\. Check the path"
        ) as e:
            use("b")
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("use", [Store.put, Store.create])
def test_a_missing_bucket_is_named_with_the_way_out(place, use):
    url = f"{place.protocol}://no-such-place/x"
    with pytest.raises(StorageError, match=rf"^{url}/a = .*be there\. Check the path") as error:
        use(Store(url), "a", b"1")
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("_no_waits")
def test_a_server_that_cannot_be_reached_is_reported(place, store):
    with place.with_settings(**servers.SETTINGS[place.protocol](servers.NOWHERE)):
        for use in (store.names, lambda: store.read("a"), lambda: store.put("a", b"1")):
            with pytest.raises(StorageError, match=r"= .*onnect.*: must be reachable") as error:
                use()
            assert "\n" not in str(error.value)

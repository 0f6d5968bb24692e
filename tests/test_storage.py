"""Files on any filesystem: atomic writes, lists, reads, removal, and the text of errors."""

import errno
import os
import pickle
import sys
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import aiohttp
import fsspec
import pytest
from botocore.exceptions import EndpointConnectionError, NoCredentialsError
from fsspec.registry import _registry

from sdbatch import retries, storage
from sdbatch.errors import StorageError
from sdbatch.storage import Store


def local(tmp_path):
    store = Store(str(tmp_path / "out"))
    store.begin()
    return store


@pytest.fixture(params=["local", "file://", "memory://"])
def store(request, tmp_path):
    """An empty store: a local path, the same path as a URL, and one in memory."""
    in_memory = request.param == "memory://"
    prefix = "" if request.param == "local" else request.param
    folder = f"{prefix}{uuid.uuid4().hex if in_memory else tmp_path}"
    store = Store(f"{folder}/out")
    store.begin()
    yield store
    if in_memory:
        fsspec.filesystem("memory").rm(folder, recursive=True)


def fill_disk(*args, **keys):
    raise OSError(28, "No space left on device")


def interrupt(*args, **keys):
    raise KeyboardInterrupt


def test_put_replaces_the_file_and_its_bytes_are_read_back(store):
    store.put("data/000000.bin", b"old")
    store.put("data/000000.bin", bytes(range(256)) * 1000)
    assert store.read("data/000000.bin") == bytes(range(256)) * 1000
    assert store.names("data") == {"000000.bin": 256_000}


def test_put_writes_a_view_of_memory_as_its_bytes(store):
    store.put("data/000000.bin", memoryview(b"a file")[2:])
    assert store.read("data/000000.bin") == b"file"


@pytest.mark.parametrize("step", ["replace", "fsync"])
def test_put_keeps_only_the_old_file_when_the_disk_is_full(tmp_path, monkeypatch, step):
    store = local(tmp_path)
    store.put("data/a", b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, step, fill_disk)
        for name in ("data/a", "data/b"):
            with pytest.raises(
                StorageError, match=rf"out/{name} = No space left.*have space left\."
            ):
                store.put(name, b"new")
    assert os.listdir(tmp_path / "out" / "data") == ["a"]
    assert store.read("data/a") == b"old"
    store.put("data/a", b"new")
    assert store.read("data/a") == b"new"


@pytest.mark.parametrize("step", ["replace", "fsync"])
def test_put_keeps_only_the_old_file_when_interrupted(tmp_path, monkeypatch, step):
    store = local(tmp_path)
    store.put("a", b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, step, interrupt)
        with pytest.raises(KeyboardInterrupt):
            store.put("a", b"new")
    assert os.listdir(tmp_path / "out") == ["a"]
    assert store.read("a") == b"old"


def test_put_below_a_file_fails_with_the_path(tmp_path):
    store = local(tmp_path)
    store.put("data", b"a file where a folder should be")
    with pytest.raises(StorageError, match=r"out/data/000000\.parquet = (Not a dir|File exists)"):
        store.put("data/000000.parquet", b"new")


@pytest.mark.parametrize("name", ["a", "data/a"])
def test_put_does_not_create_the_outputs_own_folder(tmp_path, name):
    """An output that was moved away is not continued in its old place."""
    store = local(tmp_path)
    os.rename(tmp_path / "out", tmp_path / "moved")
    with pytest.raises(StorageError, match=rf"out/{name} = No such file.*must be there"):
        store.put(name, b"1")
    with pytest.raises(StorageError, match=rf"out/{name} = No such file.*must be there"):
        store.create(name, b"1")
    assert os.listdir(tmp_path) == ["moved"]


def test_begin_creates_the_folder_and_those_above_it_and_keeps_what_is_there(tmp_path):
    for url in (f"{tmp_path}/a/out", f"file://{tmp_path}/b/out"):
        store = Store(url)
        store.begin()
        store.put("x", b"1")
        store.begin()
        assert store.names() == {"x": 1}


def test_begin_fails_with_the_path_where_a_file_is(tmp_path):
    (tmp_path / "out").write_text("a file where the folder should be")
    with pytest.raises(StorageError, match=r"/out = File exists: must be reachable"):
        local(tmp_path)


def test_create_writes_a_file_that_does_not_exist_and_keeps_one_that_does(store):
    assert store.create("runs/1", b"first")
    assert not store.create("runs/1", b"second, longer")
    assert store.read("runs/1") == b"first"
    assert store.names("runs") == {"1": 5}


def test_create_lets_one_of_many_threads_write(store):
    writers = [pickle.loads(pickle.dumps(store)) for _ in range(8)]
    start = threading.Barrier(len(writers))

    def create(number):
        start.wait()
        return writers[number].create("runs/1", str(number).encode())

    with ThreadPoolExecutor(len(writers)) as pool:
        created = list(pool.map(create, range(len(writers))))
    assert created.count(True) == 1
    assert store.read("runs/1") == str(created.index(True)).encode()


def test_create_fails_with_the_path_when_the_disk_is_full(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", fill_disk)
    with pytest.raises(StorageError, match=r"out/runs/1 = No space left.*have space left\."):
        local(tmp_path).create("runs/1", b"1")


def test_put_to_a_remote_store_fails_with_the_url(monkeypatch):
    store = Store(f"memory://{uuid.uuid4().hex}")
    monkeypatch.setattr(type(fsspec.filesystem("memory")), "pipe_file", fill_disk)
    with pytest.raises(StorageError, match=rf"^{store.url}/a = No space left"):
        store.put("a", b"new")


def test_read_and_open_of_a_missing_file_fail_with_its_path(store):
    store.put("a", b"")
    with pytest.raises(StorageError, match=r"out/b = .*must be there\. Check the path"):
        store.read("b")
    with pytest.raises(StorageError, match=r"out/b = .*must be there\. Check the path"):
        store.open("b")


def test_read_if_exists_returns_the_bytes_or_none(store):
    assert store.read_if_exists("a") is None
    store.put("a", b"")
    assert store.read_if_exists("a") == b""
    assert store.read_if_exists("a/below/a/file") is None


def test_names_are_the_files_of_one_folder_including_hidden_ones(store):
    assert store.names() == {}
    assert store.names("data") == {}
    for name in ("job.yaml", ".hidden.tmp", "data/000000.parquet", "data/.tmp"):
        store.put(name, b"1234")
    if storage.is_local(store.url):
        os.mkdir(store.path("data/x"))
    store.put("data/x/deep", b"1234")
    assert store.names() == {"job.yaml": 4, ".hidden.tmp": 4}
    assert store.names("data") == {"000000.parquet": 4, ".tmp": 4}


def test_names_include_files_that_another_process_wrote(store):
    assert store.names("data") == {}
    pickle.loads(pickle.dumps(store)).put("data/a", b"1")
    assert store.names("data") == {"a": 1}


def test_names_follow_links_to_files(tmp_path):
    """Tools for large datasets, such as git-annex, replace files by links."""
    store = local(tmp_path)
    store.put("data/a", b"12")
    os.rename(store.path("data/a"), tmp_path / "annexed")
    os.symlink(tmp_path / "annexed", store.path("data/a"))
    os.symlink(tmp_path / "nothing", store.path("data/b"))
    os.symlink(tmp_path, store.path("data/folder"))
    assert store.names("data") == {"a": 2}


def test_open_reads_at_any_position(store):
    store.put("a", b"0123456789")
    with store.open("a") as file:
        file.seek(7)
        assert file.read(2) == b"78"


def test_remove_deletes_a_file_and_ignores_a_missing_one(store):
    store.put("a", b"1")
    store.put("b", b"2")
    store.remove("a")
    store.remove("a")
    store.remove("no/such/folder")
    assert store.names() == {"b": 1}


def test_remove_if_empty_keeps_a_folder_with_files(tmp_path):
    store = local(tmp_path)
    store.put("data/a", b"1")
    store.remove_if_empty("data")
    assert store.names("data") == {"a": 1}
    store.remove("data/a")
    store.remove_if_empty("data")
    store.remove_if_empty()
    assert not (tmp_path / "out").exists()


def test_home_is_expanded_like_in_prompt_paths():
    assert Store("~/out").url == str(Path.home() / "out")


def test_remove_if_empty_ignores_a_missing_folder_and_keeps_one_with_files(tmp_path):
    store = Store(str(tmp_path / "out"))
    store.remove_if_empty()
    store.begin()
    store.put("a", b"1")
    store.remove_if_empty()
    assert store.names() == {"a": 1}
    store.remove("a")
    store.remove_if_empty()
    assert not (tmp_path / "out").exists()


def test_pickled_store_works_from_another_folder(store, tmp_path, monkeypatch):
    store.put("a", b"1")
    monkeypatch.chdir(tmp_path)
    copy = pickle.loads(pickle.dumps(store))
    assert (copy.url, copy.read("a")) == (store.url, b"1")


def test_store_of_a_relative_path_stays_in_the_folder_where_it_was_created(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = Store("out")
    store.begin()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    store.begin()
    store.put("a", b"1")
    assert (tmp_path / "out" / "a").read_bytes() == b"1"


def test_where_returns_the_full_path_or_url(tmp_path):
    assert local(tmp_path).where("data/a") == f"{tmp_path}/out/data/a"
    assert Store("s3://bucket/dogs/").where("data/a") == "s3://bucket/dogs/data/a"
    assert Store("s3://bucket/dogs/").where() == "s3://bucket/dogs"


def test_unknown_protocol_is_rejected_by_name():
    for use in (Store("foo://bucket/x").check_writable, lambda: storage.connect("foo://bucket/x")):
        with pytest.raises(StorageError, match=r"^foo://bucket/x = .*not known: foo: must be"):
            use()


@pytest.mark.parametrize(
    ("protocol", "package", "extra"),
    [("gs", "gcsfs", "gcs"), ("az", "adlfs", "azure"), ("abfs", "adlfs", "azure")],
)
def test_protocol_without_its_package_is_rejected_with_what_to_install(
    protocol, package, extra, monkeypatch
):
    monkeypatch.setitem(sys.modules, package, None)  # as if it was not installed
    monkeypatch.delitem(_registry, protocol, raising=False)
    words = rf'^{protocol}://b/x = .*missing: pip install "sdbatch\[{extra}\]"\.$'
    with pytest.raises(StorageError, match=words):
        Store(f"{protocol}://b/x").check_writable()


def test_protocol_without_its_package_is_rejected_with_the_words_of_fsspec():
    with pytest.raises(StorageError, match=r"^oss://b/x = .*missing: Install ossfs"):
        Store("oss://b/x").check_writable()


def test_check_writable_creates_no_folder(tmp_path):
    Store(str(tmp_path / "a" / "b")).check_writable()
    Store(f"file://{tmp_path}/a/b").check_writable()
    Store("memory://bucket/x").check_writable()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("below", ["", "/deeper/out"])
def test_check_writable_rejects_a_file_on_the_path_by_name(tmp_path, below):
    (tmp_path / "taken").write_text("")
    words = rf"^output\.path = .*taken{below}: .*taken is a file, must be a folder"
    with pytest.raises(StorageError, match=words):
        Store(f"{tmp_path}/taken{below}").check_writable()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_check_writable_rejects_a_read_only_folder(tmp_path):
    (tmp_path / "fixed").mkdir(mode=0o500)
    with pytest.raises(StorageError, match=r"^output\.path = .*must be writable, but .*fixed"):
        Store(f"{tmp_path}/fixed/out").check_writable()


def test_open_file_decompresses_by_suffix_only_with_infer(tmp_path):
    path = str(tmp_path / "a.txt.gz")
    with fsspec.open(path, "wb", compression="gzip") as file:
        file.write(b"a red dog")
    with storage.open_file(path, "infer") as file:
        assert file.read() == b"a red dog"
    with storage.open_file(path) as file:
        assert file.read(2) == b"\x1f\x8b"


def test_open_file_fails_for_a_missing_file_with_its_path(tmp_path):
    with (
        pytest.raises(StorageError, match=r"nope\.txt = .*must be there\. Check the path"),
        storage.open_file(str(tmp_path / "nope.txt")),
    ):
        pass


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            PermissionError(13, "Permission denied"),
            r"Permission denied: must be readable, an output also writable",
        ),
        (FileNotFoundError("gone"), r"gone: must be there"),
        (TimeoutError("no answer\nfor 60 s"), r"no answer for 60 s: must be reachable"),
        (ConnectionResetError(), r"ConnectionResetError: must be reachable"),
    ],
)
def test_filesystem_errors_become_one_line_with_the_way_out(error, words):
    with (
        pytest.raises(StorageError, match=rf"^s3://b/x = {words}") as caught,
        storage.storage_errors("s3://b/x"),
    ):
        raise error
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is error


def test_a_read_only_filesystem_is_reported():
    with (
        pytest.raises(StorageError, match="NotImplementedError: must be a writable filesystem"),
        storage.storage_errors("github://x"),
    ):
        raise NotImplementedError


def test_network_errors_become_storage_errors():
    botocore = pytest.importorskip("botocore.exceptions")
    with (
        pytest.raises(StorageError, match=r"^s3://b/x = Could not connect.*must be reachable"),
        storage.storage_errors("s3://b/x"),
    ):
        raise botocore.EndpointConnectionError(endpoint_url="http://s3")


def test_azures_errors_are_cut_to_their_first_line():
    azure = pytest.importorskip("azure.core.exceptions")
    with (
        pytest.raises(
            StorageError, match=r"^az://b/x = No token\.: .*Check permissions and keys\.$"
        ),
        storage.storage_errors("az://b/x"),
    ):
        raise azure.ClientAuthenticationError("No token.\nAttempted credentials:\n\tNone")


def test_other_exceptions_keep_their_type():
    with pytest.raises(ZeroDivisionError), storage.storage_errors("s3://b/x"):
        raise ZeroDivisionError


def failing(errors, fs, method):
    """Return a method of a filesystem that first raises the errors, one a call."""
    rest, real = list(errors), getattr(fs, method)

    def call(*arguments, **keys):
        if rest:
            raise rest.pop(0)
        return real(*arguments, **keys)

    return call


@pytest.fixture
def pauses(monkeypatch):
    """Record the pauses between attempts instead of waiting."""
    waited = []
    monkeypatch.setattr(retries.time, "sleep", waited.append)
    return waited


BUSY = (
    TimeoutError("no answer"),
    ConnectionResetError("reset"),
    OSError(errno.EBUSY, "SlowDown"),
    OSError(errno.EREMOTEIO, "InternalError"),
    EndpointConnectionError(endpoint_url="http://x"),
    aiohttp.ServerDisconnectedError(),
)


@pytest.mark.parametrize("error", BUSY, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(
    ("method", "use"),
    [
        ("pipe_file", lambda store: store.put("data/b", b"2")),
        ("pipe_file", lambda store: store.create("data/b", b"2")),
        ("cat_file", lambda store: store.read("data/a")),
        ("cat_file", lambda store: store.read_if_exists("data/a")),
        ("ls", lambda store: store.names("data")),
        ("rm_file", lambda store: store.remove("data/a")),
    ],
    ids=["put", "create", "read", "read if exists", "names", "remove"],
)
def test_a_store_that_is_busy_for_a_moment_is_tried_again(
    monkeypatch, pauses, caplog, method, use, error
):
    store = Store(f"memory://{uuid.uuid4().hex}/out")
    store.put("data/a", b"1")
    fs = fsspec.filesystem("memory")
    monkeypatch.setattr(fs, method, failing([error, error], fs, method))
    assert use(store) in (None, True, b"1", {"a": 1})
    assert len(pauses) == 2
    assert 0.25 <= pauses[0] <= 0.5
    assert 0.5 <= pauses[1] <= 1
    assert "Trying again in" in caplog.text


@pytest.mark.parametrize(
    "error",
    [
        PermissionError("ExpiredToken"),
        FileNotFoundError("NoSuchBucket"),
        OSError(errno.EINVAL, "InvalidRequest"),
        OSError(errno.ENOSPC, "QuotaExceeded"),
        NoCredentialsError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_does_not_pass_by_itself_fails_at_once(monkeypatch, pauses, error):
    fs = fsspec.filesystem("memory")
    monkeypatch.setattr(fs, "pipe_file", failing([error], fs, "pipe_file"))
    with pytest.raises(StorageError, match=r"^memory://x/out/a = "):
        Store("memory://x/out").put("a", b"1")
    assert pauses == []


def test_a_store_that_stays_away_fails_when_the_budget_is_spent(monkeypatch, pauses):
    clock = iter(range(0, 1000, 25))
    monkeypatch.setattr(retries.time, "monotonic", lambda: next(clock))
    fs = fsspec.filesystem("memory")
    monkeypatch.setattr(fs, "pipe_file", failing([TimeoutError("no answer")] * 99, fs, "pipe_file"))
    with pytest.raises(StorageError, match=r"no answer: must be reachable .* same command again"):
        Store("memory://x/out").put("a", b"1")
    assert len(pauses) == 4  # 25, 50, 75 and 100 s after the first attempt, of 120


def test_a_full_local_disk_fails_at_once(tmp_path, monkeypatch, pauses):
    store = local(tmp_path)
    monkeypatch.setattr(os, "replace", fill_disk)
    with pytest.raises(StorageError, match="No space left"):
        store.put("a", b"1")
    assert pauses == []

"""Files of the output: put whole or not at all, list, read, remove; what a store says in errors."""

import importlib.util
import os
import pickle
import uuid
from pathlib import Path

import fsspec
import pytest

from sdbatch import storage
from sdbatch.errors import StorageError
from sdbatch.storage import Store


def local(tmp_path):
    return Store(str(tmp_path / "out"))


@pytest.fixture(params=["local", "file://", "memory://"])
def store(request, tmp_path):
    """A store that is not there yet: a local path, the same as a URL, one in memory."""
    if request.param == "memory://":
        folder = f"memory://{uuid.uuid4().hex}"
        yield Store(f"{folder}/out")
        fsspec.filesystem("memory").rm(folder, recursive=True)
    else:
        prefix = "" if request.param == "local" else request.param
        yield Store(f"{prefix}{tmp_path}/out")


def refuse(*args, **keys):
    raise OSError(28, "No space left on device")


def interrupt(*args, **keys):
    raise KeyboardInterrupt


def test_put_bytes_are_read_back_and_replace_what_was_there(store):
    store.put("data/000000.bin", b"old")
    store.put("data/000000.bin", bytes(range(256)) * 1000)
    assert store.read("data/000000.bin") == bytes(range(256)) * 1000
    assert store.names("data") == {"000000.bin": 256_000}


@pytest.mark.parametrize("step", ["replace", "fsync"])
def test_put_leaves_the_old_file_and_no_other_when_the_disk_is_full(tmp_path, monkeypatch, step):
    store = local(tmp_path)
    store.put("data/a", b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, step, refuse)
        for name in ("data/a", "data/b"):
            with pytest.raises(StorageError, match=rf"out/{name} = No space left.*space left\."):
                store.put(name, b"new")
    assert os.listdir(tmp_path / "out" / "data") == ["a"]
    assert store.read("data/a") == b"old"
    store.put("data/a", b"new")
    assert store.read("data/a") == b"new"


@pytest.mark.parametrize("step", ["replace", "fsync"])
def test_put_leaves_the_old_file_and_no_other_when_interrupted(tmp_path, monkeypatch, step):
    store = local(tmp_path)
    store.put("a", b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, step, interrupt)
        with pytest.raises(KeyboardInterrupt):
            store.put("a", b"new")
    assert os.listdir(tmp_path / "out") == ["a"]
    assert store.read("a") == b"old"


def test_put_of_a_file_below_a_file_is_refused_with_the_path(tmp_path):
    store = local(tmp_path)
    store.put("data", b"a file where a folder should be")
    with pytest.raises(StorageError, match=r"out/data/000000\.parquet = (Not a dir|File exists)"):
        store.put("data/000000.parquet", b"new")


def test_put_to_a_remote_store_names_the_url_when_refused(monkeypatch):
    store = Store(f"memory://{uuid.uuid4().hex}")
    monkeypatch.setattr(type(fsspec.filesystem("memory")), "pipe_file", refuse)
    with pytest.raises(StorageError, match=rf"^{store.url}/a = No space left"):
        store.put("a", b"new")


def test_read_of_a_missing_file_is_refused_with_its_path(store):
    store.put("a", b"")
    with pytest.raises(StorageError, match=r"out/b = .*must be there\. Check the path"):
        store.read("b")
    with pytest.raises(StorageError, match=r"out/b = .*must be there\. Check the path"):
        store.open("b")


def test_find_gives_the_bytes_or_none(store):
    assert store.find("a") is None
    store.put("a", b"")
    assert store.find("a") == b""
    assert store.find("a/below/a/file") is None


def test_names_are_the_files_of_one_folder_hidden_ones_too(store):
    assert store.names() == {}
    assert store.names("data") == {}
    for name in ("job.yaml", ".hidden.tmp", "data/000000.parquet", "data/.tmp", "data/x/deep"):
        store.put(name, b"1234")
    assert store.names() == {"job.yaml": 4, ".hidden.tmp": 4}
    assert store.names("data") == {"000000.parquet": 4, ".tmp": 4}


def test_names_see_what_another_process_wrote(store):
    assert store.names("data") == {}
    pickle.loads(pickle.dumps(store)).put("data/a", b"1")
    assert store.names("data") == {"a": 1}


def test_open_reads_at_any_position(store):
    store.put("a", b"0123456789")
    with store.open("a") as file:
        file.seek(7)
        assert file.read(2) == b"78"


def test_remove_takes_a_file_away_and_is_content_without_one(store):
    store.put("a", b"1")
    store.put("b", b"2")
    store.remove("a")
    store.remove("a")
    store.remove("no/such/folder")
    assert store.names() == {"b": 1}


def test_remove_if_empty_leaves_a_folder_that_holds_something(tmp_path):
    store = Store(str(tmp_path / "out"))
    store.put("data/a", b"1")
    store.remove_if_empty("data")
    assert store.names("data") == {"a": 1}
    store.remove("data/a")
    store.remove_if_empty("data")
    store.remove_if_empty()
    assert not (tmp_path / "out").exists()


def test_home_is_expanded_as_in_prompt_paths():
    assert Store("~/out").url == str(Path.home() / "out")


def test_remove_if_empty_leaves_a_folder_that_holds_anything(tmp_path):
    store = local(tmp_path)
    store.remove_if_empty()
    store.put("a", b"1")
    store.remove_if_empty()
    assert store.names() == {"a": 1}
    store.remove("a")
    store.remove_if_empty()
    assert not (tmp_path / "out").exists()


def test_store_travels_between_processes_and_folders(store, tmp_path, monkeypatch):
    store.put("a", b"1")
    monkeypatch.chdir(tmp_path)
    twin = pickle.loads(pickle.dumps(store))
    assert (twin.url, twin.read("a")) == (store.url, b"1")


def test_store_of_a_relative_path_stays_where_it_was_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = Store("out")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    store.put("a", b"1")
    assert (tmp_path / "out" / "a").read_bytes() == b"1"


def test_store_says_where_its_files_are(tmp_path):
    assert local(tmp_path).where("data/a") == f"{tmp_path}/out/data/a"
    assert Store("s3://bucket/dogs/").where("data/a") == "s3://bucket/dogs/data/a"
    assert Store("s3://bucket/dogs/").where() == "s3://bucket/dogs"


def test_unknown_protocol_is_refused_with_the_protocol():
    for use in (Store("foo://bucket/x").check_writable, lambda: storage.connect("foo://bucket/x")):
        with pytest.raises(StorageError, match=r"^foo://bucket/x = .*not known: foo: must be"):
            use()


@pytest.mark.parametrize(
    ("url", "package"), [("gs://bucket/x", "gcsfs"), ("abfs://box/x", "adlfs")]
)
def test_protocol_without_its_package_is_refused_with_what_to_install(url, package):
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    with pytest.raises(StorageError, match=rf"^{url} = .*missing: pip install {package}\."):
        Store(url).check_writable()


def test_check_writable_makes_nothing_where_a_folder_can_be_made(tmp_path):
    Store(str(tmp_path / "a" / "b")).check_writable()
    Store(f"file://{tmp_path}/a/b").check_writable()
    Store("memory://bucket/x").check_writable()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("below", ["", "/deeper/out"])
def test_check_writable_refuses_a_file_in_the_way_with_its_path(tmp_path, below):
    (tmp_path / "taken").write_text("")
    words = rf"^output\.path = .*taken{below}: .*taken is a file, it must be a folder"
    with pytest.raises(StorageError, match=words):
        Store(f"{tmp_path}/taken{below}").check_writable()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_check_writable_refuses_a_folder_that_is_read_only(tmp_path):
    (tmp_path / "fixed").mkdir(mode=0o500)
    with pytest.raises(StorageError, match=r"^output\.path = .*must be writable, and .*fixed"):
        Store(f"{tmp_path}/fixed/out").check_writable()


def test_open_file_unpacks_by_suffix_and_reads_bytes_as_they_are(tmp_path):
    path = str(tmp_path / "a.txt.gz")
    with fsspec.open(path, "wb", compression="gzip") as file:
        file.write(b"a red dog")
    with storage.open_file(path, "infer") as file:
        assert file.read() == b"a red dog"
    with storage.open_file(path) as file:
        assert file.read(2) == b"\x1f\x8b"


def test_open_file_refuses_a_missing_file_with_its_path(tmp_path):
    with (
        pytest.raises(StorageError, match=r"nope\.txt = .*must be there\. Check the path"),
        storage.open_file(str(tmp_path / "nope.txt")),
    ):
        pass


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (PermissionError(13, "Permission denied"), r"Permission denied: must be readable, an outp"),
        (FileNotFoundError("gone"), r"gone: must be there"),
        (TimeoutError("no answer\nfor 60 s"), r"no answer for 60 s: must be within reach"),
        (ConnectionResetError(), r"ConnectionResetError: must be within reach"),
    ],
)
def test_errors_of_a_store_become_one_line_with_the_way_out(error, words):
    with (
        pytest.raises(StorageError, match=rf"^s3://b/x = {words}") as caught,
        storage.errors("s3://b/x"),
    ):
        raise error
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is error


def test_a_filesystem_that_cannot_be_written_is_told():
    with (
        pytest.raises(StorageError, match="NotImplementedError: must be a filesystem that can be"),
        storage.errors("github://x"),
    ):
        raise NotImplementedError


def test_errors_of_a_network_client_become_storage_errors():
    botocore = pytest.importorskip("botocore.exceptions")
    with (
        pytest.raises(StorageError, match=r"^s3://b/x = Could not connect.*must be within reach"),
        storage.errors("s3://b/x"),
    ):
        raise botocore.EndpointConnectionError(endpoint_url="http://s3")


def test_errors_leave_a_bug_its_own_type():
    with pytest.raises(ZeroDivisionError), storage.errors("s3://b/x"):
        raise ZeroDivisionError

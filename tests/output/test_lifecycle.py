"""The output as a whole: what is not of sdbatch is left unchanged."""

import shutil
import uuid
from dataclasses import replace

import fsspec
import huggingface_hub
import pytest

from sdbatch.batch import pipeline
from sdbatch.batch.pool import Machine, Machines
from sdbatch.errors import ModelError, StorageError
from sdbatch.job import Prompts
from sdbatch.models import find_model
from sdbatch.output import lease, lifecycle, names, receipts
from sdbatch.output.pulse import Pulse
from sdbatch.output.record import read_record, require_record
from sdbatch.report import scores, sheet
from sdbatch.storage import Store
from tests import finished

PROMPTS = Prompts(path="elsewhere.txt")


@pytest.mark.parametrize(
    "name", ["data/x.csv", "README.md", "gallery/me.png", "manifest.parquet", "receipts/a"]
)
def test_folder_with_files_where_the_outputs_go_is_an_error(tmp_path, name):
    store = Store(str(tmp_path))
    assert store.create(name, b"mine")
    with pytest.raises(StorageError, match=r"holds .* but no job.yaml.*left unchanged"):
        lifecycle.check_output(store, PROMPTS)


def test_folder_with_a_job_file_of_the_user_is_an_error(tmp_path):
    store = Store(str(tmp_path))
    store.put("job.yaml", b"prompts: {path: data/prompts.txt}\n")
    with pytest.raises(StorageError, match=r"its job.yaml was not written by a run"):
        lifecycle.check_output(store, PROMPTS)


INSIDE = [
    ("p", "p/out"),
    ("p", "p"),
    ("p/", "p/out/"),
    ("p/*.csv", "p/out"),
    ("p/*.csv", "p"),
    ("p/**", "p/a/b/out"),
    ("p/**/x?.csv", "p/out"),
    ("p/data[0-9]/*.csv", "p/out"),
    ("**", "out"),
    ("link", "p/out"),
    ("p", "link/out"),
    ("link/*.csv", "p/out"),
    ("file://{}/p", "p/out"),
    ("p", "file://{}/p/out"),
    ("p/../p/./", "p/out"),
    (["elsewhere.csv", "p"], "p/out"),
    ("s3://b/p", "s3://b/p/out"),
    ("s3://b/p/", "s3://b/p/out/"),
    ("s3://b", "s3://b/out"),
    ("s3a://b/p", "s3://b/p/out"),
    ("simplecache::s3://b/p", "s3://b/p/out"),
    ("memory://p/**.csv", "memory://p/out"),
]


def paths_in(folder, path):
    return [each.format(folder) for each in ([path] if isinstance(path, str) else path)]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder that has p/, a link to it, and a folder with brackets in its name."""
    for name in ("p", "p[0]"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("p")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("path", "output"), INSIDE)
def test_output_inside_the_prompts_folder_is_an_error(here, path, output):
    store = Store(output.format(here))
    with pytest.raises(StorageError, match=r"^output.path = .*must not be inside prompts.path"):
        lifecycle.check_output(store, Prompts(path=paths_in(here, path)))


@pytest.mark.parametrize(
    ("path", "output"),
    [
        ("p/out/a.csv", "p/out"),
        ("p/out/data/*.parquet", "p/out"),
        ("p/out/data", "link/out"),
        ("s3://b/out/data/a.csv", "s3://b/out"),
        ("s3://b/out/data/", "s3://b"),
    ],
)
def test_prompts_inside_the_output_are_an_error(here, path, output):
    with pytest.raises(StorageError, match=r"^prompts.path = .*must not be inside output.path"):
        lifecycle.check_output(Store(output), Prompts(path=path))


@pytest.mark.parametrize(
    ("path", "output"),
    [
        ("p", "p2/out"),
        ("p/a.csv", "p/out"),
        ("*.csv", "out"),
        ("p[0]/a.csv", "out"),
        ("p[0]/*.csv", "p/out"),
        ("memory://p/prompts", "memory://p/prompts2/out"),
        ("memory://p/prompts", "p/prompts/out"),
        ("memory://p/a.csv?versionId=1", "memory://p/out"),
    ],
)
def test_output_next_to_the_prompts_is_accepted(here, path, output):
    lifecycle.check_output(Store(output), Prompts(path=path))


def test_folder_of_a_run_that_died_before_it_drew_may_be_written(tmp_path):
    store = Store(str(tmp_path / "out"))
    Pulse(lease.take(store)).end("stopped")
    assert files_of(store) == {"progress.json"}
    lifecycle.check_output(store, PROMPTS)


def put(store, *files, content=b"mine"):
    store.begin()
    for name in files:
        store.put(name, content)


def files_of(store):
    """Return the files of an output besides its runs."""
    folders = ("", *names.SHARD_FOLDERS, names.GALLERY_FOLDER)
    return {f"{folder}/{name}".lstrip("/") for folder in folders for name in store.names(folder)}


def temporary(folder):
    return f"{folder}/.{uuid.uuid4().hex}.tmp".lstrip("/")


# What a user may keep next to the files of an output.
FOREIGN = (
    "notes.txt",
    ".gitignore",
    "notes.tmp",
    "my scores.parquet",
    "data/README.md",
    "data/notes.txt",
    "data/2024.csv",
    "data/20240101.parquet",
    "data/000099.parquet",
    "data/000000.tar",
    "data/000001.parquet.bak",
    "data/000001-old.parquet",
    "failed/report.html",
    "failed/000099.parquet",
    "receipts/000099.json",
    "receipts/notes.json",
    "receipts/.half.tmp",
    "gallery/mine.jpg",
)


@pytest.fixture(params=["local", "memory"])
def finish(request, make_job, prompts_of, tmp_path):
    """Finish an output of two images a shard."""
    path = str(tmp_path / "out")
    if request.param == "memory":
        path = f"memory://{uuid.uuid4().hex}"

    def finish(images=6):
        output = {"path": path, "images_per_shard": 2}
        return finished.finish(make_job(prompts={"path": prompts_of(images)}, output=output))

    yield finish
    if request.param == "memory":
        fsspec.filesystem("memory").rm(path, recursive=True)


def test_remove_takes_the_outputs_files_and_no_others(finish):
    store = finish().store
    proof = require_record(store).proof()
    put(store, *FOREIGN)
    lifecycle.remove(store, proof)
    assert files_of(store) == set(FOREIGN)
    assert {store.read(name) for name in FOREIGN} == {b"mine"}


def test_remove_takes_what_killed_runs_left(finish):
    store = finish().store
    proof = require_record(store).proof()
    put(store, temporary("data"), temporary("failed"), temporary("receipts"))
    store.remove(names.receipt_file(1))
    lifecycle.remove(store, proof)
    assert files_of(store) == set()


def test_remove_leaves_the_files_of_the_runs_as_they_say_who_may_write(finish):
    store = finish().store
    held = lease.take(store)
    lifecycle.remove(store, require_record(store).proof())
    assert set(store.names("runs")) == {"000001.json", "000002.json"}
    held.check()


def test_remove_without_a_plan_takes_what_the_receipts_list(finish):
    store = finish().store
    store.remove(names.PLAN)
    put(store, *FOREIGN)
    lifecycle.remove(store, None)
    assert files_of(store) == set(FOREIGN)


def test_remove_without_a_plan_leaves_what_no_receipt_lists(finish):
    store = finish().store
    store.put(names.receipt_file(0), b"damaged")
    store.remove(names.receipt_file(1))
    lifecycle.remove(store, None)
    assert files_of(store) == {
        "receipts/000000.json",
        "data/000000.parquet",
        "data/000001.parquet",
    }


def test_remove_takes_the_pictures_and_scores_that_were_made_of_the_output(finish):
    store = finish(2).store
    sheet.make_sheet(store, 9, None, [], 6, None)
    scores.score_output(store)
    assert set(store.names("gallery")) == {"index.html", "sheet.jpg"}
    assert "scores.parquet" in store.names()
    lifecycle.remove(store, require_record(store).proof())
    assert files_of(store) == set()


class RecordingStore(Store):
    """Keeps the names that are removed."""

    def __init__(self, url):
        super().__init__(url)
        self.removed = []

    def remove(self, name):
        self.removed.append(name)
        super().remove(name)


@pytest.mark.parametrize("has_plan", [True, False])
def test_remove_takes_the_receipts_before_the_data_and_job_yaml_last(finish, has_plan):
    """So an interrupted removal leaves no receipt without its data."""
    store = RecordingStore(finish().store.url)
    lifecycle.remove(store, require_record(store).proof() if has_plan else None)
    removed = [name for name in store.removed if "/" in name and "gallery" not in name]
    folders = [name.partition("/")[0] for name in removed]
    assert folders == sorted(folders, reverse=True)
    assert (folders[0], folders[-1]) == ("receipts", "data")
    assert store.removed[-1] == "job.yaml"


def test_remove_leaves_pictures_of_the_user_in_the_gallery(tmp_path):
    store = Store(str(tmp_path / "out"))
    put(store, "gallery/sheet.jpg", "gallery/mine.jpg", "scores.parquet", "my scores.parquet")
    lifecycle.remove(store, None)
    assert set(store.names("gallery")) == {"mine.jpg"}
    assert set(store.names()) == {"my scores.parquet"}


def test_sweep_removes_temporary_files_and_what_no_receipt_names(finish):
    output = finish()
    store, proof = output.store, require_record(output.store).proof()
    before = files_of(store)
    put(store, *(temporary(folder) for folder in ("", "runs", *names.SHARD_FOLDERS)))
    put(store, "failed/000001.parquet")
    lifecycle.sweep(store, proof, output.receipts)
    assert files_of(store) == before
    assert set(store.names("runs")) == {"000001.json"}
    lifecycle.sweep(store, proof, output.receipts[:2])
    assert before - files_of(store) == {"data/000002.parquet", "receipts/000002.json"}


def test_sweep_leaves_what_sdbatch_did_not_write(finish):
    output = finish()
    put(output.store, *FOREIGN)
    before = files_of(output.store)
    lifecycle.sweep(output.store, require_record(output.store).proof(), output.receipts)
    assert files_of(output.store) == before
    assert {output.store.read(name) for name in FOREIGN} == {b"mine"}


def test_sweep_of_a_missing_output_does_nothing(finish, tmp_path):
    proof = require_record(finish().store).proof()
    lifecycle.sweep(Store(str(tmp_path / "nothing")), proof, [])
    assert not (tmp_path / "nothing").exists()


class BlindStore(RecordingStore):
    """Lists no file, as an object store or a network filesystem may for a while."""

    def names(self, folder=""):
        return {}


def test_an_empty_listing_removes_nothing_before_the_end(finish):
    """The shards that it hides are drawn again, and their files replaced by the same bytes."""
    output = finish()
    store = BlindStore(output.store.url)
    ready = replace(pipeline.prepare(output.plan.job), store=store)
    before = files_of(output.store)
    work = pipeline.find_work(ready)
    lifecycle.begin(store, ready.plan, ready.plan.job, work.again)
    assert (len(work.todo), store.removed) == (3, [])
    lifecycle.sweep(store, require_record(store).proof(), [])
    lifecycle.remove(store, require_record(store).proof())
    assert not [name for name in store.removed if "/" in name and "gallery" not in name]
    assert before - files_of(output.store) == {
        name for name in before if "/" not in name or name.startswith("gallery/")
    }


def test_begin_removes_the_receipts_of_the_shards_that_are_drawn_again_and_their_data_stays(finish):
    output = finish()
    store = output.store
    before = files_of(store)
    lifecycle.begin(store, output.plan, output.plan.job, [1])
    assert before - files_of(store) == {"receipts/000001.json"}


def test_begin_writes_the_plan_again_where_it_was_lost(finish):
    output = finish()
    output.store.put(names.PLAN, b"cut")
    ready = pipeline.prepare(output.plan.job)
    work = pipeline.find_work(ready)
    assert work.todo == []
    lifecycle.begin(output.store, ready.plan, ready.plan.job, work.again)
    assert read_record(output.store).shards == output.plan.shards


@pytest.mark.parametrize("damage", ["remove", "cut"])
def test_shard_whose_file_is_gone_or_short_is_drawn_again(finish, damage):
    output = finish()
    data = output.store.read("data/000001.parquet")
    if damage == "remove":
        output.store.remove("data/000001.parquet")
    else:
        output.store.put("data/000001.parquet", data[:-1])
    work = pipeline.find_work(pipeline.prepare(output.plan.job))
    assert [shard.shard for shard in work.todo] == [1]
    assert work.again == {1}
    assert [receipt.shard for receipt in work.valid] == [0, 2]


def test_hash_of_weights_is_an_error_where_there_are_none_to_hash(
    make_job, tiny_model, tmp_path, monkeypatch
):
    snapshot = tmp_path / "models--someone--tiny" / "snapshots" / ("0" * 40)
    shutil.copytree(tiny_model, snapshot)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    model = {"path": "someone/tiny", "revision": "0" * 40, "sha256": "0" * 64}
    with pytest.raises(ModelError, match=r"model.sha256 = given: only local files have one"):
        pipeline.prepare(make_job(model=model))


def test_other_weights_than_the_job_names_are_an_error(make_job):
    machines = Machines((Machine(2, 0),))
    ready = pipeline.prepare(make_job(model={"path": "builtin:shapes", "sha256": "0" * 64}))
    own = find_model.sha256(ready.model)
    with pytest.raises(ModelError, match=rf"sha256 of its weights is {own}: must be {'0' * 64}"):
        pipeline._resolve(ready, machines, own)


def test_receipts_with_their_files_are_whole(finish):
    output = finish(4)
    proof = require_record(output.store).proof()
    assert receipts.proved(output.store, proof) == output.receipts
    assert list(receipts.read_receipts(output.store, proof)) == [0, 1]


@pytest.fixture
def prompts_of(tmp_path):
    def write(count: int) -> str:
        path = tmp_path / "table.txt"
        path.write_text("".join(f"a dog, number {i}\n" for i in range(count)))
        return str(path)

    return write

"""The output as a whole: what is not of sdbatch is left unchanged."""

import shutil

import huggingface_hub
import pytest

from sdbatch.batch import pipeline
from sdbatch.batch.pool import Machine, Machines
from sdbatch.errors import ModelError, StorageError
from sdbatch.job import Prompts
from sdbatch.models import find_model
from sdbatch.output import lifecycle, receipts
from sdbatch.output.record import read_record
from sdbatch.report import scores, sheet
from sdbatch.storage import Store
from tests import finished

PROMPTS = Prompts(path="elsewhere.txt")


@pytest.mark.parametrize(
    "name", ["data/x.csv", "README.md", "gallery/me.png", "manifest.parquet", "receipts/a"]
)
def test_folder_with_files_where_the_outputs_go_is_an_error(tmp_path, name):
    store = Store(str(tmp_path))
    store.put(name, b"mine")
    with pytest.raises(StorageError, match=r"holds .* but no job.yaml.*left unchanged"):
        lifecycle.check_output(store, PROMPTS)


def test_folder_with_a_job_file_of_the_user_is_an_error(tmp_path):
    store = Store(str(tmp_path))
    store.put("job.yaml", b"prompts: {path: data/prompts.txt}\n")
    with pytest.raises(StorageError, match=r"its job.yaml was not written by a run"):
        lifecycle.check_output(store, PROMPTS)


def test_output_inside_the_prompts_folder_is_an_error(tmp_path):
    with pytest.raises(StorageError, match=r"must not be inside prompts.path"):
        lifecycle.check_output(
            Store(str(tmp_path / "p" / "out")), Prompts(path=str(tmp_path / "p"))
        )


def test_remove_takes_the_outputs_files_and_no_others(tmp_path):
    store = Store(str(tmp_path / "out"))
    for name in ("data/000000.parquet", "receipts/000000.json", "job.yaml", "README.md"):
        store.put(name, b"ours")
    store.put("data/notes.txt", b"mine")
    lifecycle.remove(store)
    assert store.names() == {}
    assert store.names("data") == {"notes.txt": 4}
    assert store.names("receipts") == {}


def test_remove_takes_the_pictures_and_scores_that_were_made_of_the_output(
    make_job, prompts_of, tmp_path
):
    output_of = finished.finish(make_job(prompts={"path": prompts_of(2)}))
    sheet.make_sheet(output_of.store, 9, None, [], 6, None)
    scores.score_output(output_of.store)
    assert set(output_of.store.names("gallery")) == {"index.html", "sheet.jpg"}
    assert "scores.parquet" in output_of.store.names()
    lifecycle.remove(output_of.store)
    assert not (tmp_path / "out").exists()


class RecordingStore(Store):
    """Keeps the names that are removed."""

    def __init__(self, url):
        super().__init__(url)
        self.removed = []

    def remove(self, name):
        self.removed.append(name)
        super().remove(name)


def test_remove_takes_the_receipts_before_the_data_and_job_yaml_last(make_job, prompts_of):
    """So an interrupted removal leaves no receipt without its data."""
    store = RecordingStore(finished.finish(make_job(prompts={"path": prompts_of(4)})).store.url)
    lifecycle.remove(store)
    names = [name for name in store.removed if "/" in name and "gallery" not in name]
    folders = [name.partition("/")[0] for name in names]
    assert folders == sorted(folders, reverse=True)
    assert folders[0] == "receipts"
    assert store.removed[-1] == "job.yaml"


def test_remove_leaves_pictures_of_the_user_in_the_gallery(tmp_path):
    store = Store(str(tmp_path / "out"))
    for name in ("gallery/sheet.jpg", "gallery/mine.jpg", "scores.parquet", "my scores.parquet"):
        store.put(name, b"a file")
    lifecycle.remove(store)
    assert set(store.names("gallery")) == {"mine.jpg"}
    assert set(store.names()) == {"my scores.parquet"}


@pytest.mark.parametrize("damage", ["remove", "cut"])
def test_shard_whose_file_is_gone_or_short_is_drawn_again(make_job, prompts_of, tmp_path, damage):
    job = make_job(prompts={"path": prompts_of(6)}, output={"images_per_shard": 2})
    finished.finish(job)
    data = tmp_path / "out" / "data" / "000001.parquet"
    if damage == "remove":
        data.unlink()
    else:
        data.write_bytes(data.read_bytes()[:-1])
    ready = pipeline.prepare(job)
    assert [shard.shard for shard in ready.todo] == [1]
    assert [receipt.shard for receipt in ready.redraw] == [1]


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


def test_receipts_with_their_files_are_whole(make_job, prompts_of, tmp_path):
    job = make_job(prompts={"path": prompts_of(4)}, output={"images_per_shard": 2})
    finished.finish(job)
    store = Store(str(tmp_path / "out"))
    found = receipts.read_receipts(store, receipts.committed_shards(store))
    assert receipts.complete_shards(store, found) == {0, 1}
    assert read_record(store) is not None


@pytest.fixture
def prompts_of(tmp_path):
    def write(count: int) -> str:
        path = tmp_path / "table.txt"
        path.write_text("".join(f"a dog, number {i}\n" for i in range(count)))
        return str(path)

    return write

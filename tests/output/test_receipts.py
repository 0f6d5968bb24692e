"""What proves a shard: committed whole or not at all, summed up, listed, swept up after a crash."""

import hashlib
import json
import uuid

import fsspec
import pyarrow.parquet as pq
import pytest

from sdbatch import schema
from sdbatch.errors import StorageError
from sdbatch.output import names, receipts
from sdbatch.output.receipts import Receipt
from sdbatch.storage import Store


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path):
    if request.param == "local":
        yield Store(str(tmp_path / "out"))
    else:
        store = Store(f"memory://{uuid.uuid4().hex}")
        store.put("job.yaml", b"")
        yield store
        fsspec.filesystem("memory").rm(store.url, recursive=True)


def drawn(shard, images=2, failed=1, reasons=None):
    reasons = {"width = 513": failed} if reasons is None else reasons
    return Receipt(shard, images, failed, reasons, files=[], facts={"host": "a", "seconds": 1.5})


def files(shard):
    name = schema.shard_name(shard)
    return {f"data/{name}.parquet": b"images %d" % shard, f"failed/{name}.parquet": b"why"}


def commit(store, shard, **keys):
    return receipts.commit_shard(store, drawn(shard, **keys), files(shard))


def test_commit_writes_the_files_and_the_receipt_that_proves_their_bytes(store):
    receipt = commit(store, 7)
    assert receipts.read_receipt(store, 7) == receipt
    assert [file["name"] for file in receipt.files] == list(files(7))
    for file in receipt.files:
        data = store.read(file["name"])
        assert (data, len(data)) == (files(7)[file["name"]], file["bytes"])
        assert hashlib.sha256(data).hexdigest() == file["sha256"]
    assert (receipt.images, receipt.failed, receipt.facts) == (2, 1, drawn(7).facts)


def test_commit_of_the_same_shard_again_leaves_the_same_files(store):
    assert commit(store, 0) == commit(store, 0)
    assert store.names("data") == {"000000.parquet": 8}
    assert receipts.committed_shards(store) == {0}


class LosingStore(Store):
    """Keeps the names that are put, and fails at a file whose name starts with `fatal`."""

    def __init__(self, url, fatal):
        super().__init__(url)
        self.fatal, self.order = fatal, []

    def put(self, name, data):
        self.order.append(name)
        if name.startswith(self.fatal):
            raise StorageError(f"{name} = lost the bucket")
        super().put(name, data)


@pytest.mark.parametrize("fatal", ["data/000001", "failed/000001", "receipts/000001"])
def test_shard_is_not_committed_until_its_receipt_is_written(store, fatal):
    commit(store, 0)
    losing = LosingStore(store.url, fatal)
    with pytest.raises(StorageError, match="lost the bucket"):
        commit(losing, 1)
    assert losing.order == [*files(1), names.receipt_file(1)][: len(losing.order)]
    assert losing.order[-1].startswith(fatal)
    assert receipts.committed_shards(store) == {0}
    receipts.sweep(store, receipts.read_receipts(store, receipts.committed_shards(store)))
    assert set(store.names("data")) == set(store.names("failed")) == {"000000.parquet"}
    commit(store, 1)
    assert receipts.committed_shards(store) == {0, 1}
    assert receipts.read_receipt(store, 1).files[0]["bytes"] == 8


def test_committed_are_the_numbers_of_receipts_and_nothing_else(store):
    assert receipts.committed_shards(store) == set()
    for shard in (0, 12, 1_234_567):
        commit(store, shard)
    for name in ("notes.json", "000003.json.bak", ".000004.json.tmp", "000005", "deep/000006.json"):
        store.put(f"receipts/{name}", b"{}")
    store.put("data/000008.parquet", b"no receipt")
    assert receipts.committed_shards(store) == {0, 12, 1_234_567}


def test_read_receipts_gives_the_receipts_in_order_of_shards(store):
    written = {shard: commit(store, shard) for shard in (2, 40, 0, 1)}
    read = receipts.read_receipts(store, receipts.committed_shards(store))
    assert read == [written[shard] for shard in (0, 1, 2, 40)]


def test_a_shard_without_its_receipt_is_drawn_again(store):
    first, second = commit(store, 0), commit(store, 1)
    receipts.remove_receipt(store, first)
    assert receipts.committed_shards(store) == {second.shard}
    receipts.remove_receipt(store, first)
    commit(store, 0)
    assert receipts.committed_shards(store) == {0, 1}


def test_sweep_removes_what_no_receipt_names_and_every_temporary_file(store):
    commit(store, 0)
    commit(store, 1_000_000)
    for name in ("data/000001.tar", "data/000002.parquet", "failed/000001.parquet"):
        store.put(name, b"orphan")
    for name in (".a.tmp", "data/.b.tmp", "failed/.c.tmp", "receipts/.d.tmp"):
        store.put(name, b"half")
    store.put("job.yaml", b"name: dogs")
    receipts.sweep(store, receipts.read_receipts(store, receipts.committed_shards(store)))
    assert set(store.names()) == {"job.yaml"}
    for folder, suffix in (("data", "parquet"), ("failed", "parquet"), ("receipts", "json")):
        assert set(store.names(folder)) == {f"000000.{suffix}", f"1000000.{suffix}"}


def test_sweep_leaves_what_sdbatch_did_not_write(store):
    foreign = [
        "notes.txt",
        ".gitignore",
        "notes.tmp",
        "data/README.md",
        "data/2024.csv",
        "data/000001.parquet.bak",
        "data/000001-old.parquet",
        "data/000001/x.parquet",
        "failed/report.html",
        "receipts/notes.json",
        "gallery/.x.tmp",
    ]
    for name in foreign:
        store.put(name, b"mine")
    receipts.sweep(store, [])
    assert [name for name in foreign if store.read_if_exists(name) is None] == []


def test_sweep_of_a_missing_output_does_nothing(tmp_path):
    receipts.sweep(Store(str(tmp_path / "out")), [])
    assert not (tmp_path / "out").exists()


def test_reasons_are_summed_over_shards_most_frequent_first():
    three = [
        drawn(0, failed=3, reasons={"width": 2, "steps": 1}),
        drawn(1, failed=0, reasons={}),
        drawn(2, failed=4, reasons={"steps": 4}),
    ]
    assert list(receipts.count_reasons(three).items()) == [("steps", 5), ("width", 2)]
    assert receipts.count_reasons([]) == {}


def test_manifest_holds_every_receipt_in_order_of_shards(store):
    written = [commit(store, shard) for shard in (3, 0, 2)]
    receipts.write_manifest(store, written)
    with store.open(names.MANIFEST) as file:
        table = pq.read_table(file)
    assert table.schema.equals(receipts.MANIFEST)
    assert receipts.from_table(table) == sorted(written, key=lambda receipt: receipt.shard)
    assert sum(table["images"].to_pylist()) + sum(table["failed"].to_pylist()) == 9


def test_manifest_of_no_receipt_is_a_table_without_rows(store):
    receipts.write_manifest(store, [])
    with store.open(names.MANIFEST) as file:
        assert receipts.from_table(pq.read_table(file)) == []


def test_receipt_survives_json_and_a_table_with_any_text_in_it(store):
    odd = {'prompt = "ä\n\u2028"': 1, "": 2}
    receipt = commit(store, 0, failed=3, reasons=odd)
    assert receipts.read_receipt(store, 0) == receipt
    assert receipts.from_table(receipts.to_table([receipt])) == [receipt]
    assert json.loads(store.read("receipts/000000.json"))["reasons"] == odd


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"3", b'{"shard": 0}', b"\xff", b"{}"])
def test_broken_receipt_is_an_error_with_its_path_and_the_way_out(store, text):
    commit(store, 0)
    commit(store, 1)
    store.put("receipts/000001.json", text)
    words = r"receipts/000001\.json = not a receipt .* Remove the file and run the job again"
    for read in (receipts.read_receipts, lambda store, _: receipts.read_receipt(store, 1)):
        with pytest.raises(StorageError, match=words):
            read(store, {0, 1})


def test_missing_receipt_is_an_error_with_its_path(store):
    with pytest.raises(StorageError, match=r"receipts/000001\.json = .*must be there"):
        receipts.read_receipt(store, 1)

"""What proves a shard: committed whole or not at all, read strictly, summed up, listed."""

import hashlib
import json
import os
import uuid
from dataclasses import replace

import fsspec
import pyarrow.parquet as pq
import pytest

from sdbatch import schema
from sdbatch.errors import StorageError
from sdbatch.output import identity, lease, names, receipts
from sdbatch.output.receipts import Proof, Receipt, WrittenFile
from sdbatch.storage import Store
from tests.finished import planned, writer

FACTS = {"host": "a", "seconds": 1.5}
SHARDS = [planned(number, images=3) for number in range(5)]
JOB = "0123456789abcdef"  # the fingerprint of tests.finished.writer
PROOF = Proof(JOB, "parquet", SHARDS)


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path):
    if request.param == "local":
        yield Store(str(tmp_path / "out"))
    else:
        store = Store(f"memory://{uuid.uuid4().hex}")
        store.put("job.yaml", b"")
        yield store
        fsspec.filesystem("memory").rm(store.url, recursive=True)


@pytest.fixture
def held(store):
    """The writer of the run that owns the store."""
    return writer(store)


@pytest.fixture
def local(tmp_path):
    return Store(str(tmp_path / "local"))


def drawn(shard, images=2, failed=1, reasons=None):
    """Return a receipt that no store has."""
    reasons = {"width = 513": failed} if reasons is None else reasons
    return Receipt(shard, "0" * 16, "000001-0", images, failed, reasons, files=[], facts=FACTS)


def files(shard, failed=1):
    name = schema.shard_name(shard)
    written = {f"data/{name}.parquet": b"images %d" % shard}
    return {**written, f"failed/{name}.parquet": b"why"} if failed else written


def commit(held, shard, failed=1, reasons=None):
    """Commit a shard of 3 images."""
    reasons = ({"width = 513": failed} if failed else {}) if reasons is None else reasons
    return held.commit(planned(shard, images=3), reasons, files(shard, failed), FACTS)


def read(store, shard, proof=PROOF):
    return receipts.read_receipt(store, planned(shard, images=3), proof)


def test_commit_writes_the_files_and_the_receipt_that_proves_their_bytes(store, held):
    receipt = commit(held, 4)
    assert read(store, 4) == receipt
    assert [file.name for file in receipt.files] == list(files(4))
    for file in receipt.files:
        data = store.read(file.name)
        assert (data, len(data)) == (files(4)[file.name], file.bytes)
        assert hashlib.sha256(data).hexdigest() == file.sha256
    assert (receipt.images, receipt.failed, receipt.facts) == (2, 1, FACTS)
    assert receipt.run == held.lease.run.id
    assert receipt.fingerprint == identity.shard_fingerprint(JOB, SHARDS[4])


def contents(store):
    files = [f"{folder}/{name}" for folder in names.SHARD_FOLDERS for name in store.names(folder)]
    return {name: store.read(name) for name in files}


def test_a_shard_that_the_run_has_committed_stays_though_it_is_drawn_again_otherwise(store, held):
    receipt = commit(held, 0)
    before = contents(store)
    assert commit(held, 0, failed=0) == commit(held, 0) == receipt
    assert contents(store) == before
    assert receipts.committed_shards(store) == {0}


def test_a_receipt_of_an_earlier_run_or_one_that_is_damaged_is_replaced(store, held):
    commit(held, 0)
    store.put(names.receipt_file(1), b"damaged")
    held.lease.release("finished")
    later = replace(held, lease=lease.take(store))
    for shard in (0, 1):
        commit(later, shard)
        assert read(store, shard).run == later.lease.run.id


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
def test_shard_is_not_committed_until_its_receipt_is_written(store, held, fatal):
    commit(held, 0)
    losing = LosingStore(store.url, fatal)
    with pytest.raises(StorageError, match="lost the bucket"):
        commit(replace(held, lease=replace(held.lease, store=losing)), 1)
    assert losing.order == [*files(1), names.receipt_file(1)][: len(losing.order)]
    assert losing.order[-1].startswith(fatal)
    assert receipts.committed_shards(store) == {0}
    assert [receipt.shard for receipt in receipts.proved(store, PROOF)] == [0]
    commit(held, 1)
    assert receipts.committed_shards(store) == {0, 1}
    assert read(store, 1).files[0].bytes == 8


def test_committed_are_the_numbers_of_receipts_and_nothing_else(store, held):
    assert receipts.committed_shards(store) == set()
    for shard in (0, 12, 1_234_567):
        commit(held, shard)
    for name in ("notes.json", "000003.json.bak", ".000004.json.tmp", "000005", "deep/000006.json"):
        store.put(f"receipts/{name}", b"{}")
    store.put("data/000008.parquet", b"no receipt")
    assert receipts.committed_shards(store) == {0, 12, 1_234_567}


def test_read_receipts_gives_those_of_the_plan_in_order_of_shards(store, held):
    written = {shard: commit(held, shard) for shard in (2, 4, 0, 40, 1)}
    found = receipts.read_receipts(store, PROOF)
    assert list(found.items()) == [(shard, written[shard]) for shard in (0, 1, 2, 4)]
    assert receipts.read_receipts(store, PROOF, [1, 3, 40]) == {1: written[1]}
    store.put(names.receipt_file(1), b"{")
    assert {
        shard: type(found) for shard, found in receipts.read_receipts(store, PROOF).items()
    } == {
        0: Receipt,
        1: str,
        2: Receipt,
        4: Receipt,
    }


def test_a_shard_without_its_receipt_is_drawn_again(store, held):
    commit(held, 0)
    second = commit(held, 1)
    for _ in range(2):
        store.remove(names.receipt_file(0))
        assert receipts.committed_shards(store) == {second.shard}
        assert receipts.proved(store, PROOF) == [second]
    commit(held, 0)
    assert receipts.committed_shards(store) == {0, 1}


def test_missing_receipt_is_none(store, held):
    commit(held, 0)
    assert read(store, 1) is None
    assert receipts.read_receipts(store, PROOF, [1]) == {}


def test_reasons_are_summed_over_shards_most_frequent_first():
    three = [
        drawn(0, failed=3, reasons={"width": 2, "steps": 1}),
        drawn(1, failed=0, reasons={}),
        drawn(2, failed=4, reasons={"steps": 4}),
    ]
    assert list(receipts.count_reasons(three).items()) == [("steps", 5), ("width", 2)]
    assert receipts.count_reasons([]) == {}


def test_manifest_holds_every_receipt_in_order_of_shards(store, held):
    written = [commit(held, shard) for shard in (3, 0, 2)]
    receipts.write_manifest(store, written)
    with store.open(names.MANIFEST) as file:
        table = pq.read_table(file)
    assert table.schema.equals(receipts.MANIFEST)
    assert receipts.from_table(table) == sorted(written, key=lambda receipt: receipt.shard)
    assert sum(table["images"].to_pylist()) + sum(table["failed"].to_pylist()) == 9


def test_manifest_of_no_receipt_is_a_table_without_rows(store):
    store.begin()
    receipts.write_manifest(store, [])
    with store.open(names.MANIFEST) as file:
        assert receipts.from_table(pq.read_table(file)) == []


def test_receipt_survives_json_and_a_table_with_any_text_in_it(store, held):
    odd = {'prompt = "ä\n\u2028"': 1, "": 2}
    receipt = held.commit(SHARDS[0], odd, {"failed/000000.parquet": b"why"}, {"odd": [None, "\0"]})
    assert read(store, 0) == receipt
    assert receipts.from_table(receipts.to_table([receipt])) == [receipt]
    assert json.loads(store.read("receipts/000000.json"))["reasons"] == odd


GARBAGE = {
    "empty": b"",
    "half": b"{",
    "list": b"[]",
    "number": b"3",
    "null": b"null",
    "no key": b"{}",
    "one key": b'{"shard": 0}',
    "not UTF-8": b"\xff",
    "zeros": bytes(400),
    "deep": b"[" * 100_000,
    "long number": b'{"shard": ' + b"9" * 10_000 + b"}",
}


@pytest.mark.parametrize("content", GARBAGE.values(), ids=GARBAGE)
def test_receipt_that_is_garbage_reads_as_a_reason(store, held, content):
    proved = commit(held, 0)
    commit(held, 1)
    store.put("receipts/000001.json", content)
    reason = read(store, 1)
    assert reason.startswith("it cannot be read: ")
    assert receipts.read_receipts(store, PROOF) == {0: proved, 1: reason}
    assert receipts.proved(store, PROOF) == [proved]


FILES = [WrittenFile(name, 1, "0" * 64).__dict__ for name in files(1)]
# What a receipt says instead -> words of the reason.
CHANGES = {
    "another shard's": ({"shard": 2}, "it is of shard 2"),
    "another job's": ({"fingerprint": "f" * 16}, "it is of another job or of other rows"),
    "too few": ({"images": 1}, "counts 1 drawn and 1 failed images, but the plan has 3 images"),
    "too many": ({"images": 2**70}, "but the plan has 3 images"),
    "negative images": ({"images": -1}, "it cannot be read: images: "),
    "negative failed": ({"images": 4, "failed": -1}, "it cannot be read: failed: "),
    "negative shard": ({"shard": -1}, "it cannot be read: shard: "),
    "reasons of fewer": ({"reasons": {}}, "its reasons are not of 1 failed images"),
    "reasons of more": ({"reasons": {"a": 1, "b": 1}}, "its reasons are not of 1 failed images"),
    "negative reason": ({"reasons": {"a": 3, "b": -2}}, "it cannot be read: reasons.b: "),
    "no files": ({"files": []}, "its files must be data/000001.parquet and failed/000001.parquet"),
    "one file": ({"files": FILES[:1]}, "its files must be data/000001.parquet and failed/"),
    "one file twice": ({"files": FILES[:1] * 2}, "its files must be data/000001.parquet and"),
    "other order": ({"files": FILES[::-1]}, "its files must be data/000001.parquet and failed/"),
    "another format": (
        {"files": [{**FILES[0], "name": "data/000001.tar"}, FILES[1]]},
        "its files must be data/000001.parquet and",
    ),
    "another folder": (
        {"files": [{**FILES[0], "name": "../data/000001.parquet"}, FILES[1]]},
        "its files must be data/000001.parquet and",
    ),
    "all failed": (
        {"images": 0, "failed": 3, "reasons": {"a": 3}},
        "its files must be failed/000001.parquet",
    ),
    "negative size": ({"files": [{**FILES[0], "bytes": -1}]}, "it cannot be read: files.0.bytes: "),
    "no checksum": ({"files": [{**FILES[0], "sha256": ""}]}, "it cannot be read: files.0.sha256: "),
    "files of text": ({"files": ["data/000001.parquet"]}, "it cannot be read: files.0: "),
    "text": ({"images": "2"}, "it cannot be read: images: "),
    "true": ({"failed": True}, "it cannot be read: failed: "),
    "fraction": ({"images": 2.0}, "it cannot be read: images: "),
    "null": ({"reasons": None}, "it cannot be read: reasons: "),
    "facts of a list": ({"facts": []}, "it cannot be read: facts: "),
    "number as run": ({"run": 1}, "it cannot be read: run: "),
    "unknown key": ({"more": 1}, "it cannot be read: more: "),
}


@pytest.mark.parametrize(("change", "words"), CHANGES.values(), ids=CHANGES)
def test_receipt_that_says_something_else_reads_as_a_reason(store, held, change, words):
    commit(held, 1)
    written = json.loads(store.read("receipts/000001.json"))
    store.put("receipts/000001.json", json.dumps({**written, **change}).encode())
    reason = read(store, 1)
    assert isinstance(reason, str)
    assert words in reason
    assert receipts.read_receipts(store, PROOF) == {1: reason}
    assert receipts.proved(store, PROOF) == []


@pytest.mark.parametrize("key", ["shard", "fingerprint", "run", "images", "failed", "reasons"])
def test_receipt_without_a_key_reads_as_a_reason_with_the_key(store, held, key):
    commit(held, 1)
    written = json.loads(store.read("receipts/000001.json"))
    del written[key]
    store.put("receipts/000001.json", json.dumps(written).encode())
    assert read(store, 1).startswith(f"it cannot be read: {key}: ")


@pytest.mark.parametrize(
    "proof",
    [
        Proof("f" * 16, "parquet", SHARDS),
        Proof(JOB, "parquet", [replace(shard, checksum="f" * 16) for shard in SHARDS]),
        Proof(JOB, "parquet", [replace(shard, source="other.txt") for shard in SHARDS]),
        Proof(JOB, "parquet", [replace(shard, first_image=3) for shard in SHARDS]),
    ],
    ids=["job", "checksum", "file", "rows"],
)
def test_receipt_of_another_job_or_table_proves_nothing(store, held, proof):
    commit(held, 0)
    reason = "it is of another job or of other rows"
    assert receipts.read_receipts(store, proof) == {0: reason}
    assert receipts.proved(store, proof) == []


def test_receipt_beyond_the_plan_is_not_read(store, held):
    inside, _ = commit(held, 0), commit(held, len(SHARDS))
    assert receipts.proved(store, PROOF) == [inside]
    assert receipts.read_receipts(store, PROOF, [len(SHARDS)]) == {}


def test_proved_leaves_out_shards_whose_files_are_missing_or_have_another_size(store, held):
    written = [commit(held, shard, failed=shard % 2) for shard in range(5)]
    store.remove("data/000000.parquet")
    store.remove("failed/000001.parquet")
    store.put("data/000002.parquet", b"images 2 and more")
    store.put("failed/000003.parquet", b"")
    assert receipts.proved(store, PROOF) == written[4:]
    store.put("data/000002.parquet", b"IMAGES 2")  # `verify` compares the bytes
    assert receipts.proved(store, PROOF) == [written[2], written[4]]


def test_shard_of_which_every_row_failed_is_proved_without_data(store, held):
    failed = {"failed/000000.parquet": b"why"}
    receipt = held.commit(SHARDS[0], {"a": 2, "b": 1}, failed, {})
    assert (receipt.images, receipt.failed) == (0, 3)
    assert receipts.proved(store, PROOF) == [receipt]


def test_symbolic_links_to_data_files_count_as_the_files(local, tmp_path):
    held = writer(local)
    written = [commit(held, shard) for shard in (0, 1)]
    data = tmp_path / "local/data"
    os.rename(data / "000000.parquet", tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", data / "000000.parquet")
    assert receipts.proved(local, PROOF) == written
    (tmp_path / "elsewhere").write_bytes(b"shorter")
    assert receipts.proved(local, PROOF) == written[1:]
    (tmp_path / "elsewhere").unlink()
    assert receipts.proved(local, PROOF) == written[1:]


def test_listed_files_are_the_receipts_and_the_files_of_their_own_shards(store, held):
    commit(held, 0)
    commit(held, 7, failed=0)
    written = json.loads(store.read("receipts/000000.json"))
    foreign = [{**written["files"][0], "name": "data/000009.parquet"}]
    store.put("receipts/000003.json", json.dumps({**written, "files": foreign}).encode())
    store.put("receipts/000004.json", b"mine")
    assert sorted(receipts.listed_files(store)) == [
        "data/000000.parquet",
        "data/000007.parquet",
        "failed/000000.parquet",
        "receipts/000000.json",
        "receipts/000003.json",
        "receipts/000007.json",
    ]

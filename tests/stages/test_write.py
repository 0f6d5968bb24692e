"""The write stage: a drawn shard to its files, and last the receipt that commits it."""

import errno
import hashlib
import io
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sdbatch import schema
from sdbatch.batch.blocks import unpack
from sdbatch.errors import StorageError
from sdbatch.job import Output
from sdbatch.output import formats, lease, receipts
from sdbatch.output.receipts import Proof, Receipt
from sdbatch.stages.base import facts_of
from sdbatch.stages.write import WriteShard
from sdbatch.storage import Store
from tests.finished import block, draw, draw_rows, planned, writer

PROMPTS = ("a red dog", "fail", "a blue dog", "a green dog")
FAULT = "ValueError: this prompt cannot be drawn"
FORMATS = ("parquet", "webdataset")
SUFFIX = {"parquet": "parquet", "webdataset": "tar"}


class Listing(Store):
    """An output that a run owns; keeps the names that are put, in order."""

    def __init__(self, folder):
        super().__init__(str(folder))
        self.put_names = []
        self.writer = writer(self)

    def put(self, name, data):
        self.put_names.append(name)
        super().put(name, data)


def settings(output_format="parquet", image_format="jpg"):
    return Output(path="unused", format=output_format, image_format=image_format)


def write(store, shard, output=None):
    """Write a drawn block; return its receipt."""
    stage = WriteShard(output or settings(), store.writer)
    (receipt,) = receipts.from_table(stage(unpack(shard)))
    return receipt


def read_receipt(store, shard):
    """Return the receipt of a shard of PROMPTS, which must prove it."""
    row = planned(shard, len(PROMPTS))
    receipt = receipts.read_receipt(store, row, Proof(store.writer.fingerprint, "parquet", [row]))
    assert isinstance(receipt, Receipt), receipt
    return receipt


@pytest.fixture
def store(tmp_path):
    return Listing(tmp_path / "out")


@pytest.mark.parametrize("output_format", FORMATS)
def test_write_puts_drawn_rows_into_data_and_failed_rows_into_failed(output_format, store):
    shard = block(PROMPTS, 3, tags=pa.array([["a"], ["b"], None, []]))
    (rows,) = draw_rows(shard)
    write(store, *draw(shard), settings(output_format))

    name = f"data/000003.{SUFFIX[output_format]}"
    good = rows.filter(rows["error"].is_null()).drop_columns(["error"])
    assert list(formats.read_shard(io.BytesIO(store.read(name)), name)) == good.to_pylist()
    failed = pq.read_table(io.BytesIO(store.read("failed/000003.parquet")))
    assert failed.to_pylist() == rows.filter(rows["error"].is_valid()).to_pylist()
    assert failed.schema.equals(schema.failed(schema.extras_of(rows.schema)))


@pytest.mark.parametrize("output_format", FORMATS)
def test_write_puts_the_data_first_then_the_failed_rows_then_the_receipt(output_format, store):
    write(store, *draw(block(PROMPTS)), settings(output_format))

    data = f"data/000000.{SUFFIX[output_format]}"
    assert store.put_names == [data, "failed/000000.parquet", "receipts/000000.json"]


def test_write_gives_the_receipt_that_it_put(store):
    (drawn,) = draw(block(PROMPTS, 12))
    receipt = write(store, drawn)

    assert receipt == read_receipt(store, 12)
    assert (receipt.shard, receipt.images, receipt.failed) == (12, 3, 1)
    assert receipt.reasons == {FAULT: 1}
    assert receipt.facts == facts_of(unpack(drawn))
    assert receipt.facts["attempt"] == 1


def test_write_proves_every_file_in_the_receipt(store):
    receipt = write(store, *draw(block(PROMPTS)))

    proved = {file.name: (file.bytes, file.sha256) for file in receipt.files}
    put = {name: store.read(name) for name in store.put_names[:-1]}
    assert proved == {
        name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in put.items()
    }


def test_write_gives_back_a_row_of_the_manifest(store):
    found = WriteShard(settings(), store.writer)(*map(unpack, draw(block(PROMPTS))))

    assert found.schema == receipts.MANIFEST
    assert found.num_rows == 1


def test_write_counts_the_reasons_with_the_most_frequent_first(store):
    errors = {0: "bad height", 1: "no prompt", 2: "no prompt"}
    receipt = write(store, *draw(block(["a", "b", "c", "fail", "d"], errors=errors)))

    assert (receipt.images, receipt.failed) == (1, 4)
    assert list(receipt.reasons.items()) == [("no prompt", 2), ("bad height", 1), (FAULT, 1)]


def test_write_puts_no_data_when_every_row_failed(store):
    receipt = write(store, *draw(block(["fail", "fail"])))

    assert store.put_names == ["failed/000000.parquet", "receipts/000000.json"]
    assert (receipt.images, receipt.failed) == (0, 2)


def test_write_puts_no_failed_rows_when_none_failed(store):
    receipt = write(store, *draw(block(["a dog", "a cat"])))

    assert store.put_names == ["data/000000.parquet", "receipts/000000.json"]
    assert (receipt.images, receipt.failed, receipt.reasons) == (2, 0, {})


@pytest.mark.parametrize("image_format", ["jpg", "png", "webp"])
@pytest.mark.parametrize("output_format", FORMATS)
def test_write_puts_the_same_bytes_when_a_shard_is_drawn_and_written_twice(
    output_format, image_format, tmp_path
):
    found = []
    for time in ("first", "second"):
        store = Listing(tmp_path / time)
        drawn = draw(block(PROMPTS, 0), block(["another"], 1), image_format=image_format)[0]
        receipt = write(store, drawn, settings(output_format, image_format))
        found.append([(file, store.read(file.name)) for file in receipt.files])

    assert found[0] == found[1]
    assert len(found[0]) == 2


def test_write_leaves_a_shard_as_it_is_when_its_run_has_committed_it(store):
    (drawn,) = draw(block(PROMPTS))
    receipt = write(store, drawn)
    before = {name: store.read(name) for name in store.put_names}

    assert write(store, drawn) == receipt
    assert {name: store.read(name) for name in store.put_names} == before
    assert store.names("data").keys() == {"000000.parquet"}


@pytest.mark.parametrize("folder", ["data", "failed", "receipts"])
def test_write_leaves_no_receipt_and_no_half_file_when_a_put_fails(folder, store, monkeypatch):
    replace = os.replace

    def fill_the_disk(source, target):
        if f"/{folder}/" in target:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), target)
        replace(source, target)

    (drawn,) = draw(block(PROMPTS))
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fill_the_disk)
        with pytest.raises(StorageError, match=rf"out/{folder}/000000\..* = No space left"):
            write(store, drawn)

    assert receipts.committed_shards(store) == set()
    assert store.names(folder) == {}
    receipt = write(store, drawn)  # the same command again
    assert read_receipt(store, 0) == receipt


@pytest.mark.parametrize("output_format", FORMATS)
def test_write_puts_the_bytes_of_the_drawn_rows_alone_when_others_failed(output_format, store):
    prompts = ("fail", "a", "b", "fail", "fail", "c", "fail", "d")
    output = settings(output_format)
    shard = block(prompts, 3, breed=pa.array(["pug", None] * 4))
    (rows,) = draw_rows(shard)
    write(store, *draw(shard), output)

    good = rows.filter(rows["error"].is_null()).drop_columns(["error"])
    name = f"data/000003.{SUFFIX[output_format]}"
    assert store.read(name) == bytes(formats.write_shard(good, output))


def test_write_puts_scores_between_our_columns_and_the_tables_own(store):
    fields = pa.schema([("fidelity", pa.float64()), ("fidelity_colour", pa.bool_())])
    rows = unpack(*draw(block(PROMPTS, 0, breed=pa.array(["pug", None, "lab", "pug"]))))
    metadata = rows.schema.metadata
    scores = ([1.0, None, 0.5, 0.0], [True, None, None, False])
    for field, values in zip(fields, scores, strict=True):
        rows = rows.append_column(field, pa.array(values, field.type))
    rows = rows.replace_schema_metadata(metadata)
    receipts.from_table(WriteShard(settings(), store.writer, fields)(rows))

    extras = pa.schema([("breed", pa.string())])
    data = pq.read_table(io.BytesIO(store.read("data/000000.parquet")))
    assert data.schema.equals(schema.images(extras, fields))
    assert data["fidelity"].to_pylist() == [1.0, 0.5, 0.0]
    failed = pq.read_table(io.BytesIO(store.read("failed/000000.parquet")))
    assert failed.schema.equals(schema.failed(extras, fields))


def test_write_raises_when_a_folder_of_the_output_cannot_be_made(store):
    (drawn,) = draw(block(PROMPTS))
    store.put("data", b"a file where the folder should be")

    with pytest.raises(StorageError, match=r"out/data/000000\.parquet = "):
        write(store, drawn)


def test_write_makes_no_output_again_that_was_moved_away(store, tmp_path):
    (drawn,) = draw(block(PROMPTS))
    (tmp_path / "out").rename(tmp_path / "moved")

    with pytest.raises(StorageError, match=r"out: it was moved away or emptied, so this run"):
        write(store, drawn)
    assert not (tmp_path / "out").exists()


def test_write_commits_nothing_when_another_run_owns_the_output(store):
    (drawn,) = draw(block(PROMPTS))
    store.writer.lease.release("stopped")
    other = lease.take(store)

    with pytest.raises(StorageError, match=rf"run {other.run.id} .* owns it now, so this run"):
        write(store, drawn)
    assert store.names("data") == store.names("receipts") == {}

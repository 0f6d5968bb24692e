"""The faults that `sdbatch verify` reports, and that it reports none in a sound output."""

import io
import json
import os
import re
import uuid
from dataclasses import asdict

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sdbatch.batch import pipeline
from sdbatch.errors import JobError, StorageError
from sdbatch.job import Output
from sdbatch.output import formats, lease, names, receipts
from sdbatch.output.receipts import Writer
from sdbatch.output.record import require_record
from sdbatch.output.verify import repair, verify_output
from sdbatch.storage import Store
from tests.finished import finish, planned, small_job

FORMATS = ("parquet", "webdataset")
SUFFIX = {"parquet": "parquet", "webdataset": "tar"}
DAMAGES = ("empty", "cut", "footer", "pages")
DRAWN_AGAIN = "`sdbatch verify --repair` lets the next run draw its shard again."


@pytest.fixture(params=FORMATS)
def sound(request, make_job, tmp_path):
    """A finished output of 3 shards; rows of the first two failed."""
    return finish(small_job(make_job, tmp_path, output={"format": request.param}))


@pytest.fixture
def in_parquet(make_job, tmp_path):
    """The same output in Parquet alone."""
    return finish(small_job(make_job, tmp_path))


def data_file(output, shard):
    return f"data/{shard:06d}.{SUFFIX[output.plan.job.output.format]}"


def flip(path, at):
    """Flip one byte of the file, `at` from 0, its first, to 1, its last."""
    data = bytearray(path.read_bytes())
    data[int(at * (len(data) - 1))] ^= 0xFF
    path.write_bytes(data)


def damage_parquet(data, damage):
    """Return a Parquet file of which a part is removed or overwritten."""
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    return {
        "empty": b"",
        "cut": data[:-20],
        "footer": data[:footer] + bytes(len(data) - 8 - footer) + data[-8:],
        "pages": data[:4] + bytes(footer - 4) + data[footer:],
    }[damage]


def commit(output, shard, reasons, files):
    """Commit a shard in a run that ends after it."""
    held = lease.take(output.store)
    fingerprint = require_record(output.store).fingerprint
    receipt = Writer(held, fingerprint).commit(shard, reasons, files, {})
    held.release("finished")
    return receipt


def rewrite(output, shard, change, folder="data"):
    """Change the rows of a shard's file, and update its receipt and the manifest."""
    (receipt,) = [receipt for receipt in output.receipts if receipt.shard == shard]
    files = {file.name: output.store.read(file.name) for file in receipt.files}
    (name,) = [name for name in files if name.startswith(folder)]
    rows = change(pq.read_table(io.BytesIO(files[name])))
    if folder == "data":
        files[name] = formats.write_shard(rows, Output(path="unused"))
    else:
        sink = pa.BufferOutputStream()
        pq.write_table(rows, sink)
        files[name] = sink.getvalue().to_pybytes()
    new = commit(output, output.plan.shards[shard], receipt.reasons, files)
    rest = [receipt for receipt in output.receipts if receipt.shard != shard]
    receipts.write_manifest(output.store, [new, *rest])


def with_column(rows, name, values):
    at = rows.schema.get_field_index(name)
    return rows.set_column(
        at, rows.schema.field(name), pa.array(values, rows.schema.field(name).type)
    )


def change_receipt(output, shard, **values):
    (receipt,) = [receipt for receipt in output.receipts if receipt.shard == shard]
    changed = {**asdict(receipt), **values}
    output.store.put(names.receipt_file(shard), json.dumps(changed).encode())


def find_faults(output):
    return [fault.text for fault in verify_output(output.store)]


def shards_at_fault(output):
    return {fault.shard for fault in verify_output(output.store)}


def test_verify_reports_nothing_when_the_output_is_sound(sound):
    assert find_faults(sound) == []


@pytest.mark.parametrize("image_format", ["png", "webp"])
def test_verify_reports_nothing_in_other_image_formats(image_format, make_job, tmp_path):
    job = small_job(make_job, tmp_path, output={"image_format": image_format})

    assert find_faults(finish(job)) == []


@pytest.mark.parametrize("prompts", [("fail",), ("fail",) * 5, ("a dog",)])
def test_verify_reports_nothing_when_all_rows_failed_or_there_is_one(prompts, make_job, tmp_path):
    assert find_faults(finish(small_job(make_job, tmp_path, prompts))) == []


@pytest.mark.parametrize("at", [0, 0.3, 0.5, 0.9, 1])
@pytest.mark.parametrize("shard", [0, 2])
def test_verify_names_a_data_file_when_a_byte_of_it_is_flipped(sound, shard, at):
    name = data_file(sound, shard)
    flip(sound.folder / name, at)
    (fault,) = find_faults(sound)

    assert fault.startswith(f"{name}: ")
    assert "its checksum differs from the receipt's" in fault


def test_verify_names_a_file_of_failed_rows_when_a_byte_of_it_is_flipped(sound):
    flip(sound.folder / "failed/000001.parquet", 0.5)
    (fault,) = find_faults(sound)

    assert fault.startswith("failed/000001.parquet: ")
    assert "its checksum differs from the receipt's" in fault


def test_verify_names_a_file_when_it_is_cut_short(sound):
    path = sound.folder / data_file(sound, 1)
    path.write_bytes(path.read_bytes()[:-100])
    (fault,) = find_faults(sound)

    assert fault.startswith(data_file(sound, 1))


@pytest.mark.parametrize("shard", [0, 2])
def test_verify_names_a_data_file_when_it_is_missing(sound, shard):
    name = data_file(sound, shard)
    (sound.folder / name).unlink()

    assert find_faults(sound) == [f"{name}: missing, but its receipt lists it. {DRAWN_AGAIN}"]


def test_verify_names_a_file_of_failed_rows_when_it_is_missing(sound):
    (sound.folder / "failed/000000.parquet").unlink()

    assert find_faults(sound) == [
        f"failed/000000.parquet: missing, but its receipt lists it. {DRAWN_AGAIN}"
    ]


def test_verify_names_a_missing_receipt_and_the_files_that_it_listed(sound):
    (sound.folder / "receipts/000001.json").unlink()
    first, *rest = find_faults(sound)

    assert first == "receipts/000001.json: missing. Run the job again, which draws its shard."
    assert [fault.partition(":")[0] for fault in rest] == [
        data_file(sound, 1),
        "failed/000001.parquet",
    ]
    assert all("no receipt lists it" in fault for fault in rest)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b'{"shard": 1}', b"\xff\xfe"])
def test_verify_names_a_receipt_when_it_is_damaged(sound, text):
    sound.store.put("receipts/000001.json", text)
    first, *_ = find_faults(sound)

    assert first.startswith("receipts/000001.json: it cannot be read: ")
    assert first.endswith("The next run draws its shard again.")


def test_verify_names_the_manifest_when_it_is_missing(sound):
    (sound.folder / "manifest.parquet").unlink()
    (fault,) = find_faults(sound)

    assert fault.startswith("manifest.parquet: missing")


def test_verify_names_the_manifest_when_it_lists_other_receipts(sound):
    receipts.write_manifest(sound.store, sound.receipts[:-1])
    (fault,) = find_faults(sound)

    assert fault.startswith("manifest.parquet: differs from the receipts")


@pytest.mark.parametrize("damage", DAMAGES)
def test_verify_names_the_manifest_when_it_is_damaged(in_parquet, damage):
    path = in_parquet.folder / "manifest.parquet"
    path.write_bytes(damage_parquet(path.read_bytes(), damage))
    (fault,) = find_faults(in_parquet)

    assert fault.startswith("manifest.parquet: ")


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ({"images": 2}, "it counts 2 drawn and 1 failed images, but the plan has 2 images"),
        ({"failed": 2}, "it counts 1 drawn and 2 failed images, but the plan has 2 images"),
        ({"images": 0, "failed": 2}, "its reasons are not of 2 failed images"),
        ({"images": 1, "failed": 0, "reasons": {}}, "it counts 1 drawn and 0 failed images"),
        ({"fingerprint": "f" * 16}, "it is of another job or of other rows"),
        ({"files": []}, "its files must be data/000001."),
    ],
)
def test_verify_names_a_receipt_that_does_not_prove_its_shard(sound, counts, words):
    change_receipt(sound, 1, **counts)
    first, *rest = find_faults(sound)

    assert first.startswith(f"receipts/000001.json: {words}")
    assert first.endswith("The next run draws its shard again.")
    assert [fault.partition(":")[0] for fault in rest] == [
        data_file(sound, 1),
        "failed/000001.parquet",
    ]
    assert shards_at_fault(sound) == {1, None}


def test_verify_names_a_shard_when_receipt_and_manifest_agree_on_wrong_counts(sound):
    (receipt,) = [receipt for receipt in sound.receipts if receipt.shard == 1]
    data = [asdict(file) for file in receipt.files[:1]]
    change_receipt(sound, 1, images=2, failed=0, reasons={}, files=data)
    found = receipts.read_receipts(sound.store, require_record(sound.store).proof())
    receipts.write_manifest(sound.store, found.values())

    assert find_faults(sound) == [
        f"{data_file(sound, 1)}: 1 images, the receipt counts 2. {DRAWN_AGAIN}",
        f"shard 000001: keys must be 000001-000000 to 000001-000001, each once. {DRAWN_AGAIN}",
        "failed/000001.parquet: no receipt lists it. A run that ends removes it if its plan names "
        "it; else move it away, as readers of failed/ take it for a shard.",
    ]


def test_verify_names_a_file_of_failed_rows_that_has_other_counts(in_parquet):
    rewrite(in_parquet, 1, lambda rows: pa.concat_tables([rows, rows]), folder="failed")

    assert find_faults(in_parquet) == [
        f"failed/000001.parquet: 2 rows, the receipt counts 1 with an error. {DRAWN_AGAIN}",
        f"shard 000001: keys must be 000001-000000 to 000001-000001, each once. {DRAWN_AGAIN}",
    ]


def test_verify_names_the_manifest_when_a_receipt_was_committed_again(sound):
    (receipt,) = [receipt for receipt in sound.receipts if receipt.shard == 2]
    files = {file.name: sound.store.read(file.name) for file in receipt.files}
    commit(sound, sound.plan.shards[2], {}, files)

    assert find_faults(sound) == [
        "manifest.parquet: differs from the receipts. Run the job again, which writes it again."
    ]


@pytest.mark.parametrize("name", ["README.md", "gallery/index.html"])
def test_verify_names_a_page_when_it_is_missing(sound, name):
    sound.store.remove(name)

    assert find_faults(sound) == [f"{name}: missing. Run the job again, which writes it again."]


@pytest.mark.parametrize(
    "name", ["data/notes.txt", "data/000009.parquet", "failed/000002.parquet", "data/000000.bak"]
)
def test_verify_names_a_file_that_no_receipt_lists(sound, name):
    sound.store.put(name, b"unknown")
    (fault,) = find_faults(sound)

    assert fault.startswith(f"{name}: no receipt lists it")


@pytest.mark.parametrize("folder", ["data", "failed"])
def test_verify_names_a_temporary_file_that_a_kill_left(sound, folder, monkeypatch):
    """The kill came between writing the temporary file and renaming it."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: None)
        sound.store.put(f"{folder}/000001.parquet", b"half")
    (fault,) = find_faults(sound)

    assert fault.startswith(f"{folder}/.")
    assert "a temporary file" in fault


def test_verify_names_a_receipt_of_a_shard_that_is_not_in_the_plan(sound):
    commit(sound, planned(7), {"unknown": 1}, {})

    assert find_faults(sound) == ["receipts/000007.json: its shard is not in the plan. Remove it."]


@pytest.mark.parametrize(
    "keys",
    [
        ["000002-000001", "000002-000000"],  # swapped
        ["000002-000000", "000002-000000"],  # one of them twice
        ["000002-000000", "000002-000002"],  # past the end
        ["000001-000000", "000002-000001"],  # of another shard
        ["000002-000000", "dog"],
    ],
    ids=["swapped", "twice", "past the end", "another shard's", "not a key"],
)
def test_verify_names_a_shard_when_its_keys_are_not_its_own_in_order(in_parquet, keys):
    rewrite(in_parquet, 2, lambda rows: with_column(rows, "key", keys))
    (fault,) = find_faults(in_parquet)

    assert "000002" in fault
    assert "key" in fault


def test_verify_names_a_row_that_has_the_image_of_another_row(in_parquet):
    def swap_images(rows):
        return with_column(rows, "image", rows["image"].to_pylist()[::-1])

    rewrite(in_parquet, 2, swap_images)

    assert find_faults(in_parquet) == [
        f"data/000002.parquet: image 000002-00000{at} does not match the sha256 of its row. "
        f"{DRAWN_AGAIN}"
        for at in range(2)
    ]


def test_verify_names_a_data_file_when_it_lacks_a_row(in_parquet):
    rewrite(in_parquet, 2, lambda rows: rows.slice(0, 1))

    assert find_faults(in_parquet) == [
        f"data/000002.parquet: 1 images, the receipt counts 2. {DRAWN_AGAIN}",
        f"shard 000002: keys must be 000002-000000 to 000002-000001, each once. {DRAWN_AGAIN}",
    ]


def test_verify_names_a_shard_when_a_failed_row_has_the_key_of_a_drawn_one(in_parquet):
    def take_key(rows):
        return with_column(rows, "key", ["000001-000000"])

    rewrite(in_parquet, 1, take_key, folder="failed")

    assert find_faults(in_parquet) == [
        f"shard 000001: keys must be 000001-000000 to 000001-000001, each once. {DRAWN_AGAIN}"
    ]


@pytest.mark.parametrize("folder", ["data", "failed"])
@pytest.mark.parametrize("content", [b"", b"no table", b"PAR1" * 9])
def test_verify_names_a_file_that_was_committed_unreadable(sound, folder, content):
    (receipt,) = [receipt for receipt in sound.receipts if receipt.shard == 1]
    files = {
        file.name: content if file.name.startswith(folder) else sound.store.read(file.name)
        for file in receipt.files
    }
    (name,) = [name for name in files if name.startswith(folder)]
    commit(sound, sound.plan.shards[1], receipt.reasons, files)
    first, *_ = find_faults(sound)

    assert first.startswith(f"{name}: cannot be read (")
    assert first.endswith(DRAWN_AGAIN)
    assert "\n" not in first


def test_verify_names_every_fault_when_there_are_several(sound):
    flip(sound.folder / data_file(sound, 0), 0.5)
    (sound.folder / "failed/000001.parquet").unlink()
    (sound.folder / "manifest.parquet").unlink()
    sound.store.put("data/notes.txt", b"unknown")
    names_in_faults = {fault.partition(":")[0] for fault in find_faults(sound)}

    expected = {"failed/000001.parquet", "manifest.parquet", "data/notes.txt"}
    assert names_in_faults == {data_file(sound, 0), *expected}


def test_verify_raises_when_there_is_no_output(tmp_path):
    with pytest.raises(StorageError, match=r"no job\.yaml: must be the output of a job"):
        list(verify_output(Store(str(tmp_path / "nothing"))))


@pytest.mark.parametrize("damage", DAMAGES)
def test_verify_raises_when_the_plan_is_damaged(in_parquet, damage):
    path = in_parquet.folder / "plan.parquet"
    path.write_bytes(damage_parquet(path.read_bytes(), damage))

    with pytest.raises(
        StorageError, match=r"plan\.parquet = missing or damaged.*Run the job again"
    ):
        find_faults(in_parquet)


WAYS = re.compile(
    r"(Run the job again, which (writes it again|draws its shard)"
    r"|`sdbatch verify --repair` lets the next run draw its shard again"
    r"|The next run draws its shard again"
    r"|A run that ends removes it"
    r"|Remove it)\.$"
    r"|A run that ends removes it if its plan names it; else move it away, as readers .*\.$"
)


def temporary(folder):
    return f"{folder}/.{uuid.uuid4().hex}.tmp".lstrip("/")


def test_every_fault_has_a_way_out(make_job, tmp_path):
    output = finish(small_job(make_job, tmp_path, ("a dog", "fail") * 6))
    store = output.store
    store.remove(data_file(output, 0))
    flip(output.folder / data_file(output, 1), 0.5)
    flip(output.folder / "failed/000002.parquet", 0.5)
    store.put(names.receipt_file(3), b"{")
    store.remove(names.receipt_file(4))
    rewrite(output, 5, lambda rows: with_column(rows, "key", ["dog"]))
    commit(output, planned(7), {"unknown": 1}, {})
    for folder in ("", "runs", "data", "failed", "receipts"):
        store.put(temporary(folder), b"half")
    store.put("data/mine.txt", b"mine")
    faults = find_faults(output)

    assert len(faults) == 17
    assert [fault for fault in faults if not WAYS.search(fault)] == []
    assert [fault for fault in faults if "\n" in fault] == []


def test_repair_removes_exactly_the_receipts_of_the_shards_at_fault(sound):
    flip(sound.folder / data_file(sound, 0), 0.5)
    flip(sound.folder / "failed/000001.parquet", 0.5)
    sound.store.put("data/mine.txt", b"mine")
    before = {folder: sound.store.names(folder) for folder in ("", "data", "failed")}

    assert repair(sound.store, list(verify_output(sound.store))) == 2
    assert set(sound.store.names("receipts")) == {"000002.json"}
    assert {folder: sound.store.names(folder) for folder in before} == before
    work = pipeline.find_work(pipeline.prepare(sound.plan.job))
    assert [shard.shard for shard in work.todo] == [0, 1]
    assert shards_at_fault(sound) == {None}


def test_repair_removes_a_receipt_that_proves_nothing(sound):
    change_receipt(sound, 1, fingerprint="f" * 16)

    assert repair(sound.store, list(verify_output(sound.store))) == 1
    assert set(sound.store.names("receipts")) == {"000000.json", "000002.json"}


def test_repair_removes_nothing_where_no_shard_is_at_fault(sound):
    sound.store.remove("manifest.parquet")

    assert repair(sound.store, list(verify_output(sound.store))) == 0
    assert len(sound.store.names("receipts")) == 3


def test_repair_is_refused_while_a_run_lives(sound):
    flip(sound.folder / data_file(sound, 0), 0.5)
    faults = list(verify_output(sound.store))
    held = lease.take(sound.store)

    with pytest.raises(JobError, match=rf"process {os.getpid()} on .*is drawing it"):
        repair(sound.store, faults)
    assert len(sound.store.names("receipts")) == 3
    held.check()


def test_repair_lets_the_next_run_begin_at_once(sound):
    flip(sound.folder / data_file(sound, 0), 0.5)
    repair(sound.store, list(verify_output(sound.store)))

    assert lease.newest_run(sound.store).ended == "stopped"
    lease.take(sound.store).check()

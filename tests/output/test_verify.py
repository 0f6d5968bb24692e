"""The faults that `sdbatch verify` reports, and that it reports none in a sound output."""

import io
import json
import os
from dataclasses import asdict

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sdbatch.errors import StorageError
from sdbatch.job import Output
from sdbatch.output import formats, names, receipts
from sdbatch.output.verify import verify_output
from sdbatch.storage import Store
from tests.finished import finish, small_job

FORMATS = ("parquet", "webdataset")
SUFFIX = {"parquet": "parquet", "webdataset": "tar"}
DAMAGES = ("empty", "cut", "footer", "pages")


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


def rewrite(output, shard, change):
    """Change the rows of a shard's data file, and update its receipt and the manifest."""
    name = data_file(output, shard)
    rows = change(pq.read_table(io.BytesIO(output.store.read(name))))
    (receipt,) = [receipt for receipt in output.receipts if receipt.shard == shard]
    files = {file["name"]: output.store.read(file["name"]) for file in receipt.files}
    files[name] = formats.write_shard(rows, Output(path="unused"))
    new = receipts.commit_shard(output.store, receipt, files)
    rest = [receipt for receipt in output.receipts if receipt.shard != shard]
    receipts.write_manifest(output.store, [new, *rest])


def with_column(rows, name, values):
    at = rows.schema.get_field_index(name)
    return rows.set_column(
        at, rows.schema.field(name), pa.array(values, rows.schema.field(name).type)
    )


def change_receipt(output, shard, **values):
    receipt = receipts.read_receipt(output.store, shard)
    changed = {**asdict(receipt), **values}
    output.store.put(names.receipt_file(shard), json.dumps(changed).encode())


def find_faults(output):
    return list(verify_output(output.store))


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

    assert find_faults(sound) == [f"{name}: missing, but its receipt lists it"]


def test_verify_names_a_file_of_failed_rows_when_it_is_missing(sound):
    (sound.folder / "failed/000000.parquet").unlink()

    assert find_faults(sound) == ["failed/000000.parquet: missing, but its receipt lists it"]


def test_verify_names_a_missing_receipt_and_the_files_that_it_listed(sound):
    (sound.folder / "receipts/000001.json").unlink()
    first, *rest = find_faults(sound)

    assert first == "receipts/000001.json: missing. Run the job again."
    assert [fault.partition(":")[0] for fault in rest] == [
        data_file(sound, 1),
        "failed/000001.parquet",
    ]
    assert all("no receipt lists it" in fault for fault in rest)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b'{"shard": 1}', b"\xff\xfe"])
def test_verify_names_a_receipt_when_it_is_damaged(sound, text):
    sound.store.put("receipts/000001.json", text)
    first, *_ = find_faults(sound)

    assert "receipts/000001.json = not a receipt" in first


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


@pytest.mark.parametrize("counts", [{"images": 2}, {"failed": 2}, {"images": 0, "failed": 2}])
def test_verify_names_a_shard_when_its_receipt_has_other_counts(sound, counts):
    change_receipt(sound, 1, **counts)
    lines = find_faults(sound)

    assert any("000001" in fault and "receipt counts" in fault for fault in lines)
    assert any(fault.startswith("manifest.parquet: differs") for fault in lines)


def test_verify_names_a_shard_when_receipt_and_manifest_agree_on_wrong_counts(sound):
    change_receipt(sound, 1, images=0, failed=2)
    receipts.write_manifest(sound.store, receipts.read_receipts(sound.store, range(3)))
    names_in_faults = [fault.partition(":")[0] for fault in find_faults(sound)]

    assert names_in_faults == [data_file(sound, 1), "failed/000001.parquet"]


def test_verify_names_a_shard_when_it_accounts_for_fewer_images_than_the_plan(in_parquet):
    rewrite(in_parquet, 2, lambda rows: rows.slice(0, 1))
    change_receipt(in_parquet, 2, images=1)
    receipts.write_manifest(in_parquet.store, receipts.read_receipts(in_parquet.store, range(3)))
    (fault,) = find_faults(in_parquet)

    assert fault.startswith("shard 000002: the receipt counts 1 drawn and 0 failed images")


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
    receipts.commit_shard(sound.store, receipts.Receipt(7, 0, 0, {}, []), {})

    assert find_faults(sound) == ["receipts/000007.json: its shard is not in the plan"]


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
        f"data/000002.parquet: image 000002-00000{at} does not match the sha256 of its row"
        for at in range(2)
    ]


def test_verify_names_a_data_file_when_it_lacks_a_row(in_parquet):
    rewrite(in_parquet, 2, lambda rows: rows.slice(0, 1))

    assert find_faults(in_parquet) == ["data/000002.parquet: 1 images, the receipt counts 2"]


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

    with pytest.raises(StorageError, match="must be as this version of sdbatch wrote it"):
        find_faults(in_parquet)

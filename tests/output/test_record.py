"""What an output records of its job: written, read back, and rejected when broken."""

import pytest
import yaml

from sdbatch.errors import StorageError
from sdbatch.output import identity
from sdbatch.output.plan import make_plan
from sdbatch.output.record import read_record, require_record, write_record
from sdbatch.prompts.table import open_table
from sdbatch.storage import Store


@pytest.fixture
def recorded(make_job, tmp_path):
    """The plan of a job whose record is written into an output."""
    store = Store(str(tmp_path / "out"))
    assert read_record(store) is None
    job = make_job(output={"images_per_shard": 3}, prompts={"limit": 5})
    planned = make_plan(job, open_table(job.prompts), None)
    write_record(store, planned.job, planned.shards, planned.table.extras)
    return planned


def test_a_record_is_read_as_it_was_written(recorded, tmp_path):
    store = Store(str(tmp_path / "out"))
    record = read_record(store)
    assert (record.job, record.shards) == (recorded.job, recorded.shards)
    assert record.extras.equals(recorded.table.extras)
    assert record.versions == identity.versions()
    written = yaml.safe_load(store.read("job.yaml"))
    assert written["fingerprint"] == identity.fingerprint(recorded.job, identity.versions())


def test_a_folder_without_a_record_is_not_an_output(tmp_path):
    with pytest.raises(StorageError, match=r"= no job.yaml: must be the output of a job"):
        require_record(Store(str(tmp_path)))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("job.yaml", b""),
        ("job.yaml", b"[\n"),
        ("job.yaml", b"- job\n"),
        ("job.yaml", b"job: {}\nversions: {}\n"),
        ("job.yaml", b"\xff\xfe\xff"),
        ("plan.parquet", None),
        ("plan.parquet", b""),
        ("plan.parquet", b"no table"),
        ("plan.parquet", b"PAR1" + b"\xff" * 9 + b"\x09\0\0\0PAR1"),
    ],
)
def test_a_broken_record_is_an_error_with_its_path(recorded, tmp_path, file, content):
    (tmp_path / "out" / file).unlink()
    if content is not None:
        (tmp_path / "out" / file).write_bytes(content)
    with pytest.raises(StorageError, match=rf"^{tmp_path}/out/{file} = ") as caught:
        read_record(Store(str(tmp_path / "out")))
    assert "\n" not in str(caught.value)

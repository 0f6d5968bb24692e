"""What an output records of its job: written, read back, and rejected when broken."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from sdbatch.errors import StorageError
from sdbatch.output import identity, names
from sdbatch.output.plan import make_plan
from sdbatch.output.receipts import Proof
from sdbatch.output.record import read_record, require_record, write_record
from sdbatch.prompts.table import open_table
from sdbatch.storage import Store


@pytest.fixture
def store(tmp_path):
    store = Store(str(tmp_path / "out"))
    assert read_record(store) is None
    store.begin()
    return store


@pytest.fixture
def recorded(make_job, store):
    """The plan of a job whose record is written into an output."""
    job = make_job(output={"images_per_shard": 3}, prompts={"limit": 5})
    planned = make_plan(job, open_table(job.prompts), None)
    write_record(store, planned.job, planned.shards, planned.table.extras)
    return planned


def edit(store, change):
    """Change the values of job.yaml."""
    values = yaml.safe_load(store.read(names.JOB))
    change(values)
    store.put(names.JOB, yaml.safe_dump(values, sort_keys=False).encode())


def test_a_record_is_read_as_it_was_written(recorded, store):
    record = read_record(store)
    assert (record.job, record.shards) == (recorded.job, recorded.shards)
    assert record.extras.equals(recorded.table.extras)
    assert record.versions == identity.versions()
    written = yaml.safe_load(store.read("job.yaml"))
    expected = identity.fingerprint(recorded.job, identity.versions())
    assert record.fingerprint == written["fingerprint"] == expected
    assert record.planned() == recorded.shards
    assert record.proof() == Proof(expected, "parquet", recorded.shards)


def test_a_record_of_a_job_with_any_values_has_the_fingerprint_that_was_written(make_job, store):
    job = make_job(
        name="Füchse: 100 %\n",
        prompts={"images_per_row": 3, "keep": ["a", "b"]},
        model={"path": "m", "loras": [{"path": "x.safetensors", "weight": 0.1}], "vae": "v"},
        sampling={
            "seed": 2**32 - 1,
            "sampler": "ddim",
            "eta": 1e-7,
            "negative_prompt": "yes: 'no' \u2028",
        },
        engine={"lanes": {"A100": 3, "T4": 2}, "device": "cuda", "dtype": "float16"},
        output={"format": "webdataset", "quality": 90},
        safety={"checker": "c", "policy": "blank"},
        stages=[{"score": "shapes"}],
    )
    write_record(store, job, (), pa.schema([]))
    record = read_record(store)
    assert (record.job, record.shards) == (job, ())
    assert record.fingerprint == identity.fingerprint(job, identity.versions())


def test_a_folder_without_a_record_is_not_an_output(tmp_path):
    with pytest.raises(StorageError, match=r"= no job.yaml: must be the output of a job"):
        require_record(Store(str(tmp_path)))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[\n",
        b"- job\n",
        b"job: {}\nversions: {}\n",
        b"\xff\xfe\xff",
        b"fingerprint: 1\nversions: 3\njob: {}\n",
        b"job: " + b"[" * 1000,
    ],
    ids=["empty", "not YAML", "a list", "no prompts", "not UTF-8", "numbers", "deep"],
)
def test_a_broken_record_is_an_error_with_its_path(recorded, store, content):
    store.put(names.JOB, content)
    with pytest.raises(StorageError, match=rf"^{store.url}/job\.yaml = ") as caught:
        read_record(store)
    assert "\n" not in str(caught.value)
    assert "Choose another output.path, or start again with --overwrite." in str(caught.value)


@pytest.mark.parametrize("versions", [3, [], ["ab"], {"torch": ["2"]}, {"torch": {1: 2}}, None])
def test_versions_that_no_run_wrote_are_an_error_with_the_path(recorded, store, versions):
    edit(store, lambda values: values.update(versions=versions))
    with pytest.raises(StorageError, match=rf"^{store.url}/job\.yaml = .*--overwrite"):
        read_record(store)


EDITS = {
    "a seed": lambda values: values["job"]["sampling"].update(seed=1),
    "a version": lambda values: values["versions"].update(torch="0.9"),
    "no version": lambda values: values["versions"].pop("torch"),
    "the fingerprint": lambda values: values.update(fingerprint="0" * 16),
    "no text": lambda values: values.update(fingerprint=None),
}


@pytest.mark.parametrize("change", EDITS.values(), ids=EDITS)
def test_job_yaml_that_was_edited_is_an_error_with_both_fingerprints_and_the_ways_out(
    recorded, store, change
):
    edit(store, change)
    words = (
        rf"^{store.url}/job\.yaml = fingerprint .*: must be '[0-9a-f]{{16}}', .* was changed "
        r"after a run wrote it\. Undo the change, choose another output\.path, or start again with "
        r"--overwrite\.$"
    )
    with pytest.raises(StorageError, match=words):
        read_record(store)


def test_an_edit_that_changes_no_byte_of_the_data_is_accepted(recorded, store):
    edit(store, lambda values: values["job"].update(name="renamed", cluster={"actors": 7}))
    record = read_record(store)
    assert (record.job.name, record.job.cluster.actors) == ("renamed", 7)


def test_a_record_under_other_versions_is_read_with_them(recorded, store):
    def change(values):
        values["versions"]["torch"] = "0.9"
        values["fingerprint"] = identity.fingerprint(recorded.job, values["versions"])

    edit(store, change)
    record = read_record(store)
    assert record.versions == {**identity.versions(), "torch": "0.9"}
    assert record.proof().fingerprint != identity.fingerprint(recorded.job, identity.versions())


def other_table(shards):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"shard": shards}, metadata={b"extras": EXTRAS}), sink)
    return sink.getvalue().to_pybytes()


EXTRAS = pa.schema([]).serialize().to_pybytes()
PLANS = {
    "missing": lambda data: None,
    "empty": lambda data: b"",
    "text": lambda data: b"no table",
    "footer": lambda data: b"PAR1" + b"\xff" * 9 + b"\x09\0\0\0PAR1",
    "cut": lambda data: data[:-20],
    "half": lambda data: data[: len(data) // 2],
    "other columns": lambda data: other_table([0]),
    "zeros": lambda data: bytes(len(data)),
}


@pytest.mark.parametrize("damage", PLANS.values(), ids=PLANS)
def test_plan_that_is_missing_or_damaged_gives_no_shards_and_names_the_way_out(
    recorded, store, damage
):
    content = damage(store.read(names.PLAN))
    store.remove(names.PLAN)
    if content is not None:
        store.put(names.PLAN, content)
    record = read_record(store)
    assert (record.job, record.shards) == (recorded.job, None)
    for method in (record.planned, record.proof):
        with pytest.raises(
            StorageError,
            match=r"^plan\.parquet = missing or damaged.*Run the job again, which writes",
        ):
            method()


def test_plan_of_which_a_row_is_missing_gives_no_shards(recorded, store):
    table = pq.read_table(pa.BufferReader(store.read(names.PLAN)))
    sink = pa.BufferOutputStream()
    pq.write_table(table.slice(1), sink)
    store.put(names.PLAN, sink.getvalue().to_pybytes())
    assert len(recorded.shards) > 1
    assert read_record(store).shards is None

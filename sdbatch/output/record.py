"""What an output records of its job: job.yaml and plan.parquet."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from sdbatch.errors import JobError, StorageError, one_line
from sdbatch.job import Job, parse, strict_yaml
from sdbatch.output import formats, identity, names
from sdbatch.output.receipts import Proof
from sdbatch.schema import PLAN, Shard
from sdbatch.storage import Store


@dataclass(frozen=True)
class Record:
    """The job of an existing output, resolved, and its shards."""

    job: Job
    versions: dict[str, str]
    fingerprint: str
    shards: tuple[Shard, ...] | None  # None: plan.parquet is missing or damaged
    extras: pa.Schema

    def proof(self) -> Proof:
        """Return what receipts of this output must say.

        Raises:
            StorageError: plan.parquet is missing or damaged.
        """
        return proof_of(self.job, self.fingerprint, self.planned())

    def planned(self) -> tuple[Shard, ...]:
        """Return the shards.

        Raises:
            StorageError: plan.parquet is missing or damaged.
        """
        if self.shards is None:
            raise StorageError(
                f"{names.PLAN} = missing or damaged: must be as a run wrote it. Run the job again, "
                f"which writes it again from the prompt table."
            )
        return self.shards


def proof_of(job: Job, fingerprint: str, shards: Sequence[Shard]) -> Proof:
    """Return what receipts of a job's shards must say."""
    return Proof(fingerprint, formats.suffix(job.output), shards)


def write_record(store: Store, job: Job, shards: Sequence[Shard], extras: pa.Schema) -> None:
    """Write plan.parquet, then job.yaml, which makes the folder an output."""
    libraries = identity.versions()
    metadata = {b"extras": extras.serialize().to_pybytes()}
    table = pa.Table.from_pylist([asdict(shard) for shard in shards], PLAN.with_metadata(metadata))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    store.put(names.PLAN, sink.getvalue().to_pybytes())
    values = {
        "fingerprint": identity.fingerprint(job, libraries),
        "versions": libraries,
        "job": job.model_dump(mode="json"),
    }
    store.put(names.JOB, yaml.safe_dump(values, sort_keys=False, allow_unicode=True).encode())


def read_record(store: Store) -> Record | None:
    """Return the record of an output; None if there is no job.yaml.

    Raises:
        StorageError: job.yaml is not as `write_record` writes it.
    """
    text = store.read_if_exists(names.JOB)
    if text is None:
        return None
    where = store.where(names.JOB)
    try:
        values = strict_yaml.parse(text.decode(), names.JOB)
        job, libraries = parse(values["job"]), dict(values["versions"])
        fingerprint = identity.fingerprint(job, libraries)
        written = values["fingerprint"]
    except (KeyError, TypeError, ValueError, JobError) as error:
        raise StorageError(
            f"{where} = {type(error).__name__}, {one_line(error, 200)}: must be as this version of "
            f"sdbatch wrote it. Choose another output.path, or start again with --overwrite."
        ) from error
    if fingerprint != written:
        raise StorageError(
            f"{where} = fingerprint {written!r}: must be {fingerprint!r}, which its job and its "
            f"versions have: the file was changed after a run wrote it. Undo the change, choose "
            f"another output.path, or start again with --overwrite."
        )
    shards, extras = _read_plan(store)
    return Record(job, libraries, fingerprint, shards, extras)


def _read_plan(store: Store) -> tuple[tuple[Shard, ...] | None, pa.Schema]:
    """Return the shards and the table's own columns; None if plan.parquet is missing or damaged."""
    data = store.read_if_exists(names.PLAN)
    try:
        table = pq.read_table(pa.BufferReader(data or b""))
        extras = pa.ipc.read_schema(pa.py_buffer(table.schema.metadata[b"extras"]))
        if table.schema.remove_metadata() != PLAN:
            raise ValueError("columns of another file")
        shards = tuple(Shard(**row) for row in table.to_pylist())
        if [shard.shard for shard in shards] != list(range(len(shards))):
            raise ValueError("shards are missing")
    except (KeyError, TypeError, ValueError, OSError, pa.ArrowException):
        return None, pa.schema([])
    return shards, extras


def require_record(store: Store) -> Record:
    """Return the record of an output; a StorageError if there is none."""
    record = read_record(store)
    if record is None:
        raise StorageError(f"{store.url} = no {names.JOB}: must be the output of a job.")
    return record

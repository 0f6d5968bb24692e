"""What an output records of its job: job.yaml and plan.parquet."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from sdbatch.errors import JobError, StorageError, one_line
from sdbatch.job import Job, parse, strict_yaml
from sdbatch.output import identity, names
from sdbatch.schema import PLAN, Shard
from sdbatch.storage import Store


@dataclass(frozen=True)
class Record:
    """The job of an existing output, resolved, and its shards."""

    job: Job
    versions: dict[str, str]
    shards: tuple[Shard, ...]
    extras: pa.Schema


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
        StorageError: it is not as `write_record` writes it.
    """
    text = store.read_if_exists(names.JOB)
    if text is None:
        return None
    broken = (KeyError, TypeError, ValueError, OSError, pa.ArrowException, JobError)
    try:
        values = strict_yaml.parse(text.decode(), names.JOB)
        job, libraries = parse(values["job"]), values["versions"]
    except broken as error:
        raise _unreadable(store.where(names.JOB), error) from error
    data = store.read(names.PLAN)
    try:
        table = pq.read_table(pa.BufferReader(data))
        extras = pa.ipc.read_schema(pa.py_buffer(table.schema.metadata[b"extras"]))
        return Record(job, libraries, tuple(Shard(**row) for row in table.to_pylist()), extras)
    except broken as error:
        raise _unreadable(store.where(names.PLAN), error) from error


def require_record(store: Store) -> Record:
    """Return the record of an output; a StorageError if there is none."""
    record = read_record(store)
    if record is None:
        raise StorageError(f"{store.url} = no {names.JOB}: must be the output of a job.")
    return record


def _unreadable(where: str, error: Exception) -> StorageError:
    return StorageError(
        f"{where} = {type(error).__name__}, {one_line(error, 200)}: must be as this version of "
        f"sdbatch wrote it. Choose another output.path."
    )

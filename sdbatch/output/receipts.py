"""What proves a shard: commit it, read the receipts, sum them up, list them in the manifest.

A shard without a receipt does not exist. Its files are written first, each whole or not at all,
the receipt last. A receipt proves a shard of one job and of one table: by its fingerprint, its
counts and its files. One that does not prove itself is none, and its shard is drawn again.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from sdbatch.output import identity, names
from sdbatch.output.lease import Lease
from sdbatch.schema import Shard
from sdbatch.storage import Store

_PARALLEL_READS = 32
MANIFEST = pa.schema(
    [
        ("shard", pa.int64()),
        ("fingerprint", pa.string()),
        ("run", pa.string()),
        ("images", pa.int64()),
        ("failed", pa.int64()),
        ("reasons", pa.string()),  # JSON: reason -> rows
        (
            "files",
            pa.list_(
                pa.struct([("name", pa.string()), ("bytes", pa.int64()), ("sha256", pa.string())])
            ),
        ),
        ("facts", pa.string()),  # JSON: when, where and by what the shard was drawn
    ]
)
_STRICT = ConfigDict(extra="forbid", strict=True)
_Count = Annotated[int, Field(ge=0)]


@checked_dataclass(frozen=True, config=_STRICT)
class WrittenFile:
    """A file of a shard."""

    name: str  # in the output
    bytes: _Count
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


@checked_dataclass(frozen=True, config=_STRICT)
class Receipt:
    """What a shard holds. `facts` may hold clock time and host; `files` prove the bytes."""

    shard: _Count
    fingerprint: str  # of the job and the shard's rows: identity.shard_fingerprint
    run: str  # that committed it: Run.id
    images: _Count  # drawn
    failed: _Count  # rows that could not be drawn: images + failed is the shard's size
    reasons: dict[str, _Count]  # why rows failed -> how many
    files: list[WrittenFile]
    facts: dict[str, Any] = field(default_factory=dict)


_RECEIPT = TypeAdapter(Receipt)


@dataclass(frozen=True)
class Writer:
    """What a process needs to commit shards: the lease of its run, and the job's fingerprint."""

    lease: Lease
    fingerprint: str

    def commit(
        self,
        shard: Shard,
        reasons: dict[str, int],
        files: Mapping[str, bytes | memoryview],
        facts: dict[str, Any],
    ) -> Receipt:
        """Write a shard's files, then the receipt that names them; return the receipt.

        A shard that this run has committed stays as it is. Ray writes one again if its receipt was
        lost on the way to the driver, with a node.

        Raises:
            StorageError: a file cannot be written, or another run owns the output.
        """
        store = self.lease.store
        committed = self._committed(shard)
        if committed is not None:
            return committed
        failed = sum(reasons.values())
        receipt = Receipt(
            shard=shard.shard,
            fingerprint=identity.shard_fingerprint(self.fingerprint, shard),
            run=self.lease.run.id,
            images=shard.images - failed,
            failed=failed,
            reasons=reasons,
            files=[
                WrittenFile(name, len(data), hashlib.sha256(data).hexdigest())
                for name, data in files.items()
            ],
            facts=facts,
        )
        self.lease.check()
        for name, data in files.items():
            store.put(name, data)
        self.lease.check()
        store.put(names.receipt_file(shard.shard), _RECEIPT.dump_json(receipt, indent=1))
        return receipt

    def _committed(self, shard: Shard) -> Receipt | None:
        """Return the receipt with which this run has committed a shard, if it has."""
        data = self.lease.store.read_if_exists(names.receipt_file(shard.shard))
        try:
            receipt = _RECEIPT.validate_json(data) if data is not None else None
        except ValidationError:  # of no run that lives
            return None
        return receipt if receipt is not None and receipt.run == self.lease.run.id else None


@dataclass(frozen=True)
class Proof:
    """What the receipts of an output must say: of which job, of which shards, in which format."""

    fingerprint: str  # of the job
    suffix: str  # of its data files
    shards: Sequence[Shard]

    def fault(self, receipt: Receipt, shard: Shard) -> str | None:
        """Return why a receipt does not prove a shard; None if it does."""
        expected = [names.data_file(shard.shard, self.suffix)] * (receipt.images > 0)
        expected += [names.failed_file(shard.shard)] * (receipt.failed > 0)
        if receipt.shard != shard.shard:
            return f"it is of shard {receipt.shard}"
        if receipt.fingerprint != identity.shard_fingerprint(self.fingerprint, shard):
            return "it is of another job or of other rows"
        if receipt.images + receipt.failed != shard.images:
            return (
                f"it counts {receipt.images} drawn and {receipt.failed} failed images, but the "
                f"plan has {shard.images} images"
            )
        if sum(receipt.reasons.values()) != receipt.failed:
            return f"its reasons are not of {receipt.failed} failed images"
        if [file.name for file in receipt.files] != expected:
            return f"its files must be {' and '.join(expected)}"
        return None


def read_receipt(store: Store, shard: Shard, proof: Proof) -> Receipt | str | None:
    """Return the receipt of a shard, why it does not prove the shard, or None if there is none."""
    data = store.read_if_exists(names.receipt_file(shard.shard))
    if data is None:
        return None
    try:
        receipt = _RECEIPT.validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        return f"it cannot be read: {f'{where}: ' if where else ''}{first['msg']}"
    return proof.fault(receipt, shard) or receipt


def read_receipts(
    store: Store, proof: Proof, numbers: Iterable[int] | None = None
) -> dict[int, Receipt | str]:
    """Return what the store has for each shard of the plan: its receipt, or why that is no proof.

    Args:
        store: the output.
        proof: what the receipts must say.
        numbers: of shards; default: those that have a receipt.
    """
    wanted = committed_shards(store) if numbers is None else set(numbers)
    shards = [shard for shard in proof.shards if shard.shard in wanted]
    with ThreadPoolExecutor(_PARALLEL_READS) as pool:
        found = pool.map(lambda shard: read_receipt(store, shard, proof), shards)
        return {
            shard.shard: each for shard, each in zip(shards, found, strict=True) if each is not None
        }


def proved(store: Store, proof: Proof) -> list[Receipt]:
    """Return the receipts of the shards that are proved, with all their files, in order."""
    sizes = {
        f"{folder}/{name}": size
        for folder in (names.DATA, names.FAILED)
        for name, size in store.names(folder).items()
    }
    return [
        receipt
        for receipt in read_receipts(store, proof).values()
        if isinstance(receipt, Receipt)
        and all(sizes.get(file.name) == file.bytes for file in receipt.files)
    ]


def committed_shards(store: Store) -> set[int]:
    """Return the numbers of the shards that have a receipt, whether it proves them or not."""
    numbers = map(names.receipt_number, store.names(names.RECEIPTS))
    return {number for number in numbers if number is not None}


def listed_files(store: Store) -> Iterator[str]:
    """Yield the receipts of any job, and the files of their own shards that they list."""
    for number in committed_shards(store):
        name = names.receipt_file(number)
        try:
            receipt = _RECEIPT.validate_json(store.read(name))
        except ValidationError:
            continue
        yield name
        yield from (file.name for file in receipt.files if f"/{number:06d}." in file.name)


def count_reasons(receipts: Iterable[Receipt]) -> dict[str, int]:
    """Return why rows failed and how many of each, most frequent first."""
    total: Counter[str] = Counter()
    for receipt in receipts:
        total.update(receipt.reasons)
    return dict(total.most_common())


def to_table(receipts: Iterable[Receipt]) -> pa.Table:
    """Return receipts as rows of MANIFEST, in the order of their shards."""
    rows = [
        {**asdict(r), "reasons": json.dumps(r.reasons), "facts": json.dumps(r.facts)}
        for r in sorted(receipts, key=lambda r: r.shard)
    ]
    return pa.Table.from_pylist(rows, schema=MANIFEST)


def from_table(table: pa.Table) -> list[Receipt]:
    """Return the receipts in a table that `to_table` made."""
    return [
        _RECEIPT.validate_python(
            {**row, "reasons": json.loads(row["reasons"]), "facts": json.loads(row["facts"])},
            strict=False,  # strict wants objects for the files
        )
        for row in table.to_pylist()
    ]


def write_manifest(store: Store, receipts: Iterable[Receipt]) -> None:
    """Write manifest.parquet: all receipts, one row each."""
    sink = pa.BufferOutputStream()
    pq.write_table(to_table(receipts), sink)
    store.put(names.MANIFEST, sink.getvalue().to_pybytes())

"""What proves a shard: commit it, read the receipts, sum them up, list them in the manifest.

A shard without a receipt does not exist. Its files are written first, each whole or not at all,
the receipt last. A crash in between leaves files that no receipt names; `sweep` removes them.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sdbatch.errors import StorageError
from sdbatch.output import names
from sdbatch.storage import Store

_PARALLEL_READS = 32
MANIFEST = pa.schema(
    [
        ("shard", pa.int64()),
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


@dataclass(frozen=True)
class Receipt:
    """What a shard holds. `facts` may hold clock time and host; `files` prove the bytes."""

    shard: int
    images: int  # drawn
    failed: int  # rows that could not be drawn: images + failed is the shard's size
    reasons: dict[str, int]  # why rows failed -> how many
    files: list[dict[str, Any]]  # name, bytes, sha256 of each file of the shard
    facts: dict[str, Any] = field(default_factory=dict)


def commit_shard(store: Store, receipt: Receipt, files: Mapping[str, bytes]) -> Receipt:
    """Write the shard's files, then the receipt that names them; return the receipt."""
    written = []
    for name, data in files.items():
        store.put(name, data)
        written.append(
            {"name": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        )
    receipt = replace(receipt, files=written)
    text = json.dumps(asdict(receipt), indent=1)
    store.put(names.receipt_file(receipt.shard), text.encode())
    return receipt


def committed_shards(store: Store) -> set[int]:
    """Return the numbers of the shards that have a receipt."""
    files = (name for name in store.names(names.RECEIPTS) if name.endswith(".json"))
    return {int(stem) for name in files if (stem := name.removesuffix(".json")).isdigit()}


def read_receipt(store: Store, shard: int) -> Receipt:
    """Return the receipt of `shard`."""
    name = names.receipt_file(shard)
    try:
        return Receipt(**json.loads(store.read(name)))
    except (ValueError, TypeError) as error:
        raise StorageError(
            f"{store.where(name)} = not a receipt ({error}): must be as it was written. Remove "
            f"the file and run the job again, which draws its shard again."
        ) from error


def read_receipts(store: Store, shards: Iterable[int]) -> list[Receipt]:
    """Return the receipts of `shards`, in order."""
    with ThreadPoolExecutor(_PARALLEL_READS) as pool:
        return list(pool.map(lambda shard: read_receipt(store, shard), sorted(shards)))


def complete_shards(store: Store, receipts: Iterable[Receipt]) -> set[int]:
    """Return the shards whose files all exist with the sizes in their receipts."""
    sizes = {
        f"{folder}/{name}": size
        for folder in (names.DATA, names.FAILED)
        for name, size in store.names(folder).items()
    }
    return {
        receipt.shard
        for receipt in receipts
        if all(sizes.get(file["name"]) == file["bytes"] for file in receipt.files)
    }


def remove_receipt(store: Store, receipt: Receipt) -> None:
    """Remove a receipt, so that its shard is drawn again."""
    store.remove(names.receipt_file(receipt.shard))


def sweep(store: Store, valid: Iterable[Receipt]) -> None:
    """Remove what a killed run left: temporary files, and shard files that no receipt names."""
    receipted = {file["name"] for receipt in valid for file in receipt.files}
    for folder in ("", *names.SHARD_FOLDERS):
        for name in store.names(folder):
            full = f"{folder}/{name}".lstrip("/")
            shard_file = folder in (names.DATA, names.FAILED) and names.is_shard_file(name)
            if names.is_temporary(name) or (shard_file and full not in receipted):
                store.remove(full)


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
        Receipt(**{**row, "reasons": json.loads(row["reasons"]), "facts": json.loads(row["facts"])})
        for row in table.to_pylist()
    ]


def write_manifest(store: Store, receipts: Iterable[Receipt]) -> None:
    """Write manifest.parquet: all receipts, one row each."""
    sink = pa.BufferOutputStream()
    pq.write_table(to_table(receipts), sink)
    store.put(names.MANIFEST, sink.getvalue().to_pybytes())

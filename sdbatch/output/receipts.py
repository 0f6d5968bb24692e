"""What proves a shard: commit it, read the receipts, sum them up, list them in the manifest.

A shard without a receipt does not exist. Its files are written first, each whole or not at all,
the receipt last; a crash between leaves files that no receipt names, and `sweep` removes them.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sdbatch import schema
from sdbatch.errors import StorageError
from sdbatch.storage import TEMPORARY, Store

DATA, FAILED, RECEIPTS = "data", "failed", "receipts"
MANIFEST_FILE = "manifest.parquet"
OURS = re.compile(r"\d{6,}\.(parquet|tar|json)")  # names of shards' files and receipts
_AT_ONCE = 32


@dataclass(frozen=True)
class Receipt:
    """What a shard holds. `facts` may hold clock time, host and such; `files` prove the bytes."""

    shard: int
    images: int  # drawn
    failed: int  # rows that could not be drawn: images + failed is the shard's size
    reasons: dict[str, int]  # why rows failed -> how many
    files: list[dict[str, Any]]  # name, bytes, sha256 of each file of the shard
    facts: dict[str, Any] = field(default_factory=dict)


def commit(store: Store, receipt: Receipt, files: Mapping[str, bytes]) -> Receipt:
    """Write the shard's files, then the receipt that names them; return the receipt."""
    written = []
    for name, data in files.items():
        store.put(name, data)
        written.append(
            {"name": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        )
    receipt = Receipt(**{**asdict(receipt), "files": written})
    store.put(path(receipt.shard), json.dumps(asdict(receipt), indent=1).encode())
    return receipt


def committed(store: Store) -> set[int]:
    """Return the numbers of the shards that have a receipt."""
    return {
        int(name.removesuffix(".json"))
        for name in store.names(RECEIPTS)
        if name.endswith(".json") and name.removesuffix(".json").isdigit()
    }


def read(store: Store, shard: int) -> Receipt:
    """Return the receipt of `shard`."""
    try:
        return Receipt(**json.loads(store.read(path(shard))))
    except (ValueError, TypeError) as error:
        raise StorageError(
            f"{store.where(path(shard))} = no receipt ({error}): remove the file and run the job "
            f"again, which draws its shard anew."
        ) from error


def read_all(store: Store, shards: Iterable[int]) -> list[Receipt]:
    """Return the receipts of `shards`, in order."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(lambda shard: read(store, shard), sorted(shards)))


def whole(store: Store, receipts: Iterable[Receipt]) -> set[int]:
    """Return the shards whose files all stand, with the sizes that their receipts say."""
    sizes = {
        f"{folder}/{name}": size
        for folder in (DATA, FAILED)
        for name, size in store.names(folder).items()
    }
    return {
        receipt.shard
        for receipt in receipts
        if all(sizes.get(file["name"]) == file["bytes"] for file in receipt.files)
    }


def withdraw(store: Store, receipt: Receipt) -> None:
    """Make the shard of `receipt` one that is still to be drawn."""
    store.remove(path(receipt.shard))


def sweep(store: Store, kept: Iterable[Receipt]) -> None:
    """Remove what a killed run left: temporary files, and shard files that no receipt names."""
    named = {file["name"] for receipt in kept for file in receipt.files}
    for folder in ("", DATA, FAILED, RECEIPTS):
        for name in store.names(folder):
            full = f"{folder}/{name}".lstrip("/")
            ours = folder in (DATA, FAILED) and OURS.fullmatch(name)
            temporary = name.startswith(".") and name.endswith(TEMPORARY)
            if temporary or (ours and full not in named):
                store.remove(full)


def reasons(receipts: Iterable[Receipt]) -> dict[str, int]:
    """Return why rows failed and how many of each, most frequent first."""
    total: Counter[str] = Counter()
    for receipt in receipts:
        total.update(receipt.reasons)
    return dict(total.most_common())


def to_table(receipts: Iterable[Receipt]) -> pa.Table:
    """Return receipts as rows of schema.MANIFEST, in the order of their shards."""
    rows = [
        {**asdict(r), "reasons": json.dumps(r.reasons), "facts": json.dumps(r.facts)}
        for r in sorted(receipts, key=lambda r: r.shard)
    ]
    return pa.Table.from_pylist(rows, schema=schema.MANIFEST)


def from_table(table: pa.Table) -> list[Receipt]:
    """Return the receipts that `to_table` put into rows."""
    return [
        Receipt(**{**row, "reasons": json.loads(row["reasons"]), "facts": json.loads(row["facts"])})
        for row in table.to_pylist()
    ]


def write_manifest(store: Store, receipts: Iterable[Receipt]) -> None:
    """Write manifest.parquet: all receipts, one row each."""
    sink = pa.BufferOutputStream()
    pq.write_table(to_table(receipts), sink)
    store.put(MANIFEST_FILE, sink.getvalue().to_pybytes())


def path(shard: int) -> str:
    """Return where in the output the receipt of `shard` is."""
    return f"{RECEIPTS}/{schema.shard_name(shard)}.json"

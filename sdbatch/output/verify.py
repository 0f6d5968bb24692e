"""`sdbatch verify`: check every receipt, checksum, count and key of an output."""

import hashlib
import io
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq

from sdbatch import schema
from sdbatch.errors import StorageError, one_line
from sdbatch.output import formats, names, receipts
from sdbatch.output.receipts import Receipt
from sdbatch.output.record import require_record
from sdbatch.schema import Shard
from sdbatch.storage import Store

_PARALLEL_SHARDS = 4  # each is in memory while it is checked


def verify_output(store: Store) -> Iterator[str]:
    """Yield the faults of the output, one line each; nothing if the output is sound.

    Raises:
        StorageError: there is no output, or its job.yaml or plan.parquet is damaged.
    """
    record = require_record(store)
    committed = receipts.committed_shards(store)
    for shard in record.shards:
        if shard.shard not in committed:
            yield f"{names.receipt_file(shard.shard)}: missing. Run the job again."
    present = [shard for shard in record.shards if shard.shard in committed]
    readable: list[Receipt] = []
    with ThreadPoolExecutor(_PARALLEL_SHARDS) as pool:
        for receipt, faults in pool.map(lambda shard: _check_shard(store, shard), present):
            yield from faults
            readable += [receipt] if receipt is not None else []
    yield from _unexpected_files(store, readable, {shard.shard for shard in record.shards})
    if len(readable) == len(record.shards):
        yield from _check_manifest(store, readable)


def _check_shard(store: Store, shard: Shard) -> tuple[Receipt | None, list[str]]:
    """Return the receipt of a shard, None if it is damaged, and the faults of the shard."""
    try:
        receipt = receipts.read_receipt(store, shard.shard)
    except StorageError as error:
        return None, [str(error)]
    return receipt, list(_shard_faults(store, shard, receipt))


def _shard_faults(store: Store, shard: Shard, receipt: Receipt) -> Iterator[str]:
    name = schema.shard_name(shard.shard)
    if receipt.images + receipt.failed != shard.images:
        yield (
            f"shard {name}: the receipt counts {receipt.images} drawn and {receipt.failed} failed "
            f"images, but the plan has {shard.images} images"
        )
    keys: list[str] = []
    for file in receipt.files:
        data = store.read_if_exists(file["name"])
        if data is None:
            yield f"{file['name']}: missing, but its receipt lists it"
        elif hashlib.sha256(data).hexdigest() != file["sha256"]:
            yield f"{file['name']}: {len(data)} bytes, its checksum differs from the receipt's"
        else:
            yield from _check_rows(file["name"], data, receipt, keys)
    expected = {schema.key(shard.shard, index) for index in range(shard.images)}
    if len(keys) == shard.images and set(keys) != expected:
        yield f"shard {name}: keys must be {name}-000000 to -{shard.images - 1:06d}, each once"


def _check_rows(name: str, data: bytes, receipt: Receipt, keys: list[str]) -> Iterator[str]:
    """Check the rows of one file and append their keys to `keys`."""
    file_keys: list[str] = []
    if name.startswith(f"{names.FAILED}/"):
        rows = pq.read_table(pa.BufferReader(data), columns=["key", "error"]).to_pylist()
        file_keys += [row["key"] for row in rows]
        if len(rows) != receipt.failed or any(row["error"] is None for row in rows):
            yield f"{name}: {len(rows)} rows, the receipt counts {receipt.failed} with an error"
    else:
        for row in formats.read_shard(io.BytesIO(data), name):
            file_keys.append(row["key"])
            if hashlib.sha256(row["image"]["bytes"]).hexdigest() != row["sha256"]:
                yield f"{name}: image {row['key']} does not match the sha256 of its row"
        if len(file_keys) != receipt.images:
            yield f"{name}: {len(file_keys)} images, the receipt counts {receipt.images}"
    if file_keys != sorted(file_keys):
        yield f"{name}: the keys are not in order"
    keys += file_keys


def _unexpected_files(store: Store, known: Iterable[Receipt], planned: set[int]) -> Iterator[str]:
    """Yield files that no receipt lists, temporary files, and receipts that are not planned."""
    listed = {file["name"] for receipt in known for file in receipt.files}
    for folder in (names.DATA, names.FAILED):
        for name in store.names(folder):
            if f"{folder}/{name}" not in listed and not names.is_temporary(name):
                yield f"{folder}/{name}: no receipt lists it. A run removes it if sdbatch wrote it."
    for folder in ("", *names.SHARD_FOLDERS):
        for name in store.names(folder):
            if names.is_temporary(name):
                yield f"{folder}/{name}".lstrip("/") + ": a temporary file. A run removes it."
    for shard in receipts.committed_shards(store) - planned:
        yield f"{names.receipt_file(shard)}: its shard is not in the plan"


def _check_manifest(store: Store, expected: list[Receipt]) -> Iterator[str]:
    data = store.read_if_exists(names.MANIFEST)
    if data is None:
        yield f"{names.MANIFEST}: missing. Run the job again to write it."
        return
    try:
        manifest = receipts.from_table(pq.read_table(pa.BufferReader(data)))
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        yield (
            f"{names.MANIFEST}: cannot be read ({one_line(error)}). Run the job again to write it."
        )
        return
    if manifest != sorted(expected, key=lambda receipt: receipt.shard):
        yield f"{names.MANIFEST}: differs from the receipts. Run the job again to write it."

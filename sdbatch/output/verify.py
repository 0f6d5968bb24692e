"""`sdbatch verify`: check every receipt, checksum, count and key of an output."""

import hashlib
import io
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq

from sdbatch import schema
from sdbatch.errors import StorageError
from sdbatch.output import formats, plan, receipts
from sdbatch.output.receipts import Receipt
from sdbatch.schema import Shard
from sdbatch.storage import TEMPORARY, Store

_AT_ONCE = 4  # shards in memory at a time


def verify(store: Store) -> Iterator[str]:
    """Yield what is wrong with the output, one line each; nothing if all is as promised.

    Raises:
        StorageError: there is no output.
    """
    begun = plan.read(store)
    if begun is None:
        raise StorageError(f"{store.url} = no {plan.JOB_FILE}: must be the output of a job.")
    committed = receipts.committed(store)
    for shard in begun.shards:
        if shard.shard not in committed:
            yield f"{receipts.path(shard.shard)}: missing, run the job again"
    present = [shard for shard in begun.shards if shard.shard in committed]
    found: list[Receipt] = []
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for receipt, wrong in pool.map(lambda shard: _check_shard(store, shard), present):
            yield from wrong
            found += [receipt] if receipt is not None else []
    yield from _strangers(store, found, {shard.shard for shard in begun.shards})
    if len(found) == len(begun.shards):
        yield from _check_manifest(store, found)


def _check_shard(store: Store, shard: Shard) -> tuple[Receipt | None, list[str]]:
    try:
        receipt = receipts.read(store, shard.shard)
    except StorageError as error:
        return None, [str(error)]
    return receipt, list(_wrong(store, shard, receipt))


def _wrong(store: Store, shard: Shard, receipt: Receipt) -> Iterator[str]:
    name = schema.shard_name(shard.shard)
    if receipt.images + receipt.failed != shard.images:
        yield (
            f"shard {name}: its receipt counts {receipt.images} drawn and {receipt.failed} failed, "
            f"the plan {shard.images} images"
        )
    keys: list[str] = []
    for file in receipt.files:
        data = store.find(file["name"])
        if data is None:
            yield f"{file['name']}: missing, though its receipt names it"
        elif hashlib.sha256(data).hexdigest() != file["sha256"]:
            yield f"{file['name']}: {len(data)} bytes with another checksum than its receipt's"
        else:
            yield from _check_rows(file["name"], data, receipt, keys)
    expected = {schema.key(shard.shard, index) for index in range(shard.images)}
    if len(keys) == shard.images and set(keys) != expected:
        yield f"shard {name}: its keys are not {name}-000000 to -{shard.images - 1:06d}, each once"


def _check_rows(name: str, data: bytes, receipt: Receipt, keys: list[str]) -> Iterator[str]:
    """Check one file's rows and add their keys to `keys`."""
    here: list[str] = []
    if name.startswith(f"{receipts.FAILED}/"):
        rows = pq.read_table(pa.BufferReader(data), columns=["key", "error"]).to_pylist()
        here += [row["key"] for row in rows]
        if len(rows) != receipt.failed or any(row["error"] is None for row in rows):
            yield f"{name}: {len(rows)} rows, its receipt counts {receipt.failed} with an error"
    else:
        for row in formats.read(io.BytesIO(data), name):
            here.append(row["key"])
            if hashlib.sha256(row["image"]["bytes"]).hexdigest() != row["sha256"]:
                yield f"{name}: image {row['key']} has another checksum than its row's sha256"
        if len(here) != receipt.images:
            yield f"{name}: {len(here)} images, its receipt counts {receipt.images}"
    if here != sorted(here):
        yield f"{name}: its keys are not in order"
    keys += here


def _strangers(store: Store, found: Iterable[Receipt], planned: set[int]) -> Iterator[str]:
    named = {file["name"] for receipt in found for file in receipt.files}
    for folder in (receipts.DATA, receipts.FAILED):
        for name in store.names(folder):
            if f"{folder}/{name}" not in named and not name.endswith(TEMPORARY):
                yield f"{folder}/{name}: named by no receipt; a run removes it if sdbatch wrote it"
    for folder in ("", receipts.DATA, receipts.FAILED, receipts.RECEIPTS):
        for name in store.names(folder):
            if name.startswith(".") and name.endswith(TEMPORARY):
                yield f"{folder}/{name}".lstrip("/") + ": a temporary file; a run removes it"
    for shard in receipts.committed(store) - planned:
        yield f"{receipts.path(shard)}: a shard that is not in the plan"


def _check_manifest(store: Store, found: list[Receipt]) -> Iterator[str]:
    data = store.find(receipts.MANIFEST_FILE)
    if data is None:
        yield f"{receipts.MANIFEST_FILE}: missing, run the job again to have it written"
        return
    try:
        listed = receipts.from_table(pq.read_table(pa.BufferReader(data)))
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        yield f"{receipts.MANIFEST_FILE}: cannot be read ({error}), run the job again to renew it"
        return
    if listed != sorted(found, key=lambda receipt: receipt.shard):
        yield f"{receipts.MANIFEST_FILE}: differs from the receipts, run the job again to renew it"

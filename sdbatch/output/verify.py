"""`sdbatch verify`: check every receipt, checksum, count and key of an output, and repair it."""

import hashlib
import io
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq

from sdbatch import schema
from sdbatch.errors import one_line
from sdbatch.output import formats, lease, names, receipts
from sdbatch.output.devices import count_devices, several_devices
from sdbatch.output.reader import READ_ERRORS
from sdbatch.output.receipts import Proof, Receipt
from sdbatch.output.record import require_record
from sdbatch.schema import Shard
from sdbatch.storage import Store

_PARALLEL_SHARDS = 4  # each is in memory while it is checked
_WRITTEN_AGAIN = "Run the job again, which writes it again."
_DRAWN_AGAIN = "`sdbatch verify --repair` lets the next run draw its shard again"


@dataclass(frozen=True)
class Fault:
    """What is wrong, in one line, and the shard that a repair draws again."""

    text: str
    shard: int | None = None


def verify_output(store: Store) -> Iterator[Fault]:
    """Yield the faults of the output; nothing if it is complete and sound.

    Raises:
        StorageError: there is no output, or its job.yaml or plan.parquet is damaged.
    """
    record = require_record(store)
    proof, shards = record.proof(), record.planned()
    readable: list[Receipt] = []
    with ThreadPoolExecutor(_PARALLEL_SHARDS) as pool:
        for receipt, faults in pool.map(partial(_check_shard, store, proof), shards):
            yield from faults
            readable += [receipt] if receipt is not None else []
    yield from _unexpected_files(store, readable, {shard.shard for shard in shards})
    if len(readable) == len(shards):
        yield from _check_manifest(store, readable)
        for name in (names.CARD, names.GALLERY):
            if store.read_if_exists(name) is None:
                yield Fault(f"{name}: missing. {_WRITTEN_AGAIN}")


def note_devices(store: Store) -> str | None:
    """Return what a user should know of the devices that drew the output; None: it was one kind."""
    return several_devices(count_devices(receipts.proved(store, require_record(store).proof())))


def repair(store: Store, faults: Iterable[Fault]) -> int:
    """Remove the receipts of the shards at fault, so that the next run draws them again.

    Returns:
        How many shards they are.

    Raises:
        JobError: a run is drawing the output.
    """
    shards = {fault.shard for fault in faults if fault.shard is not None}
    held = lease.take(store)
    try:
        for shard in sorted(shards):
            store.remove(names.receipt_file(shard))
    finally:
        held.release("stopped")
    return len(shards)


def _check_shard(store: Store, proof: Proof, shard: Shard) -> tuple[Receipt | None, list[Fault]]:
    """Return the receipt of a shard, None if it proves nothing, and the faults of the shard."""
    name = names.receipt_file(shard.shard)
    receipt = receipts.read_receipt(store, shard, proof)
    if receipt is None:
        return None, [Fault(f"{name}: missing. Run the job again, which draws its shard.")]
    if isinstance(receipt, str):
        fault = f"{name}: {receipt}. The next run draws its shard again."
        return None, [Fault(fault, shard.shard)]
    faults = list(_shard_faults(store, shard, receipt))
    return receipt, [Fault(f"{fault}. {_DRAWN_AGAIN}.", shard.shard) for fault in faults]


def _shard_faults(store: Store, shard: Shard, receipt: Receipt) -> Iterator[str]:
    keys: list[str] = []
    damaged = False
    for file in receipt.files:
        data = store.read_if_exists(file.name)
        if data is None:
            damaged = True
            yield f"{file.name}: missing, but its receipt lists it"
        elif hashlib.sha256(data).hexdigest() != file.sha256:
            damaged = True
            yield f"{file.name}: {len(data)} bytes, its checksum differs from the receipt's"
        else:
            try:
                yield from _check_rows(file.name, data, receipt, keys)
            except (*READ_ERRORS, TypeError) as error:  # it was written so
                damaged = True
                yield f"{file.name}: cannot be read ({one_line(error, 200)})"
    expected = [schema.key(shard.shard, index) for index in range(shard.images)]
    if not damaged and sorted(keys) != expected:
        name = schema.shard_name(shard.shard)
        yield f"shard {name}: keys must be {expected[0]} to {expected[-1]}, each once"


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


def _unexpected_files(store: Store, known: Iterable[Receipt], planned: set[int]) -> Iterator[Fault]:
    """Yield files that no receipt lists, temporary files, and receipts that are not planned."""
    listed = {file.name for receipt in known for file in receipt.files}
    for folder in (names.DATA, names.FAILED):
        for name in store.names(folder):
            if f"{folder}/{name}" not in listed and not names.is_temporary(name):
                yield Fault(
                    f"{folder}/{name}: no receipt lists it. A run that ends removes it if its plan "
                    f"names it; else move it away, as readers of {folder}/ take it for a shard."
                )
    for folder in ("", *names.SHARD_FOLDERS, names.RUNS):
        for name in store.names(folder):
            if names.is_temporary(name):
                path = f"{folder}/{name}".lstrip("/")
                yield Fault(f"{path}: a temporary file. A run that ends removes it.")
    for shard in sorted(receipts.committed_shards(store) - planned):
        yield Fault(f"{names.receipt_file(shard)}: its shard is not in the plan. Remove it.")


def _check_manifest(store: Store, expected: list[Receipt]) -> Iterator[Fault]:
    data = store.read_if_exists(names.MANIFEST)
    if data is None:
        yield Fault(f"{names.MANIFEST}: missing. {_WRITTEN_AGAIN}")
        return
    try:
        manifest = receipts.from_table(pq.read_table(pa.BufferReader(data)))
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        yield Fault(f"{names.MANIFEST}: cannot be read ({one_line(error, 200)}). {_WRITTEN_AGAIN}")
        return
    if manifest != sorted(expected, key=lambda receipt: receipt.shard):
        yield Fault(f"{names.MANIFEST}: differs from the receipts. {_WRITTEN_AGAIN}")

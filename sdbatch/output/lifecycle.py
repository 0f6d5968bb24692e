"""An output as a whole: check that it may be written, begin it, end it, remove it."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from sdbatch.errors import StorageError
from sdbatch.job import Job, Prompts
from sdbatch.output import names, receipts
from sdbatch.output.plan import Plan
from sdbatch.output.receipts import Proof, Receipt
from sdbatch.output.record import write_record
from sdbatch.prompts.files import table_folder
from sdbatch.storage import Store, location

_NOT_OURS = "It is not an output of sdbatch and is left unchanged. Choose another path."


def check_output(store: Store, prompts: Prompts) -> None:
    """Raise a StorageError if the output would mix with files that are not sdbatch's."""
    for folder in filter(None, map(table_folder, prompts.paths)):
        output, table = store.location, location(folder)
        if output[: len(table)] == table:
            raise StorageError(
                f"output.path = {store.url}: must not be inside prompts.path, {folder}, whose "
                f"files it would join. Choose another path."
            )
        if table[: len(output)] == output:
            raise StorageError(
                f"prompts.path = {folder}: must not be inside output.path, {store.url}, which "
                f"holds nothing but the dataset. Move the prompts, or choose another output.path."
            )
    text = store.read_if_exists(names.JOB)
    if text is not None and b"fingerprint:" not in text:
        raise StorageError(
            f"output.path = {store.url}: its {names.JOB} was not written by a run. {_NOT_OURS}"
        )
    if text is None:
        present = store.names()
        foreign = [name for name in (names.CARD, names.MANIFEST) if name in present]
        folders = (*names.SHARD_FOLDERS, names.GALLERY_FOLDER)
        foreign += [f"{folder}/" for folder in folders if store.names(folder)]
        if foreign:
            raise StorageError(
                f"output.path = {store.url}: holds {foreign[0]} but no {names.JOB}. {_NOT_OURS}"
            )


def begin(store: Store, plan: Plan, job: Job, again: Iterable[int]) -> None:
    """Remove the receipts of the shards that are drawn again, then record the job.

    Called when the first engine stands: a job that cannot draw destroys nothing.

    Args:
        store: the output.
        plan: of the job.
        job: resolved, as job.yaml records it.
        again: shards that are drawn again though they have a receipt.
    """
    for shard in again:
        store.remove(names.receipt_file(shard))
    write_record(store, job, plan.shards, plan.table.extras)


def end(
    store: Store, proof: Proof, every: Sequence[Receipt], pages: Mapping[str, Callable[[], bytes]]
) -> None:
    """Complete a finished output: write the manifest, then `pages` by name, then sweep."""
    receipts.write_manifest(store, every)
    for name, render in pages.items():
        store.put(name, render())
    sweep(store, proof, every)


def sweep(store: Store, proof: Proof, every: Sequence[Receipt]) -> None:
    """Remove what killed runs left: temporary files, and files of shards that no receipt names.

    Only files that the plan names are removed: others may be the user's.
    """
    listed = {file.name for receipt in every for file in receipt.files}
    listed |= {names.receipt_file(receipt.shard) for receipt in every}
    planned = set(_shard_files(proof)) - listed
    for folder in ("", *names.SHARD_FOLDERS, names.RUNS):
        for name in store.names(folder):
            full = f"{folder}/{name}".lstrip("/")
            if names.is_temporary(name) or full in planned:
                store.remove(full)


def remove(store: Store, proof: Proof | None) -> None:
    """Remove the files that a job wrote, job.yaml last: an interrupted removal is recognisable.

    The files in runs/ stay: they say who may write.

    Args:
        store: the output.
        proof: of the job; None: its job.yaml or plan.parquet is lost, and receipts name its files.
    """
    ours = set(_shard_files(proof) if proof else receipts.listed_files(store))
    for folder in names.SHARD_FOLDERS:
        for name in store.names(folder):
            if f"{folder}/{name}" in ours or names.is_temporary(name):
                store.remove(f"{folder}/{name}")
        store.remove_if_empty(folder)
    for name in (names.GALLERY, names.SHEET, names.ANIMATION, names.SCORES):
        store.remove(name)
    store.remove_if_empty(names.GALLERY_FOLDER)
    for name in (names.MANIFEST, names.CARD, names.PLAN, names.JOB):
        store.remove(name)


def _shard_files(proof: Proof) -> Iterator[str]:
    """Yield the names of all files that the shards of a job may have."""
    for shard in proof.shards:
        yield names.receipt_file(shard.shard)
        yield names.data_file(shard.shard, proof.suffix)
        yield names.failed_file(shard.shard)

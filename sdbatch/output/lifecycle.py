"""An output as a whole: check that it may be written, begin it, end it, remove it."""

import os
from collections.abc import Callable, Mapping, Sequence

from sdbatch.errors import StorageError
from sdbatch.job import Job, Prompts
from sdbatch.output import names, receipts
from sdbatch.output.plan import Plan
from sdbatch.output.receipts import Receipt
from sdbatch.output.record import write_record
from sdbatch.storage import TEMPORARY, Store, is_local

_NOT_OURS = "It is not an output of sdbatch and is left unchanged. Choose another path."


def check_output(store: Store, prompts: Prompts) -> None:
    """Raise a StorageError if the output would mix with files that are not sdbatch's."""
    for path in prompts.paths:
        if is_local(path) and f"{store.url}/".startswith(f"{os.path.abspath(path)}/"):
            raise StorageError(
                f"output.path = {store.url}: must not be inside prompts.path, whose files it would "
                f"join. Choose another path."
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


def begin(
    store: Store,
    plan: Plan,
    job: Job,
    valid: Sequence[Receipt],
    again: Sequence[Receipt],
    overwrite: bool,
) -> None:
    """Remove the old shards that are drawn again, then write plan.parquet and job.yaml.

    Args:
        store: the output.
        plan: of the job.
        job: resolved, as job.yaml records it.
        valid: receipts of shards that stay.
        again: receipts of shards that are drawn again.
        overwrite: remove all that an earlier job left.
    """
    if overwrite:
        remove(store)
    for receipt in again:
        receipts.remove_receipt(store, receipt)
    write_record(store, job, plan.shards, plan.table.extras)
    receipts.sweep(store, valid)


def end(store: Store, every: Sequence[Receipt], pages: Mapping[str, Callable[[], bytes]]) -> None:
    """Complete a finished output: write the manifest, then `pages` by name, then sweep."""
    receipts.write_manifest(store, every)
    for name, render in pages.items():
        store.put(name, render())
    receipts.sweep(store, every)


def remove(store: Store) -> None:
    """Remove an output's own files, job.yaml last: an interrupted removal is recognisable."""
    for folder in names.SHARD_FOLDERS:
        for name in store.names(folder):
            if names.is_shard_file(name) or name.endswith(TEMPORARY):
                store.remove(f"{folder}/{name}")
        store.remove_if_empty(folder)
    for name in (names.GALLERY, names.SHEET, names.SCORES):
        store.remove(name)
    store.remove_if_empty(names.GALLERY_FOLDER)
    for name in (names.MANIFEST, names.CARD, names.PROGRESS, names.PLAN, names.JOB):
        store.remove(name)
    store.remove_if_empty()

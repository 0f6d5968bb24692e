"""The output as a whole: make it this job's, end it, take it away. Shards are receipts.py's."""

import os
from collections.abc import Sequence

from sdbatch.errors import StorageError
from sdbatch.job import Job, Prompts
from sdbatch.output import plan, receipts
from sdbatch.output.plan import Plan
from sdbatch.output.receipts import Receipt
from sdbatch.report import card, gallery, scores, sheet
from sdbatch.report.closing import Report
from sdbatch.report.progress import PROGRESS_FILE
from sdbatch.storage import TEMPORARY, Store, is_local


def refuse_foreign(store: Store, prompts: Prompts) -> None:
    """Raise a StorageError if the output would mix with files that are not of sdbatch."""
    for path in prompts.paths:
        if is_local(path) and f"{store.url}/".startswith(f"{os.path.abspath(path)}/"):
            raise StorageError(
                f"output.path = {store.url}: is inside prompts.path, whose files it would join. "
                f"Choose another path."
            )
    text = store.find(plan.JOB_FILE)
    if text is not None and b"fingerprint:" not in text:
        raise StorageError(
            f"output.path = {store.url}: its {plan.JOB_FILE} is no output's. {_ALONE}"
        )
    if text is None:
        here = store.names()
        holds = [name for name in (card.CARD_FILE, receipts.MANIFEST_FILE) if name in here]
        folders = (receipts.DATA, receipts.FAILED, receipts.RECEIPTS, gallery.FOLDER)
        holds += [f"{folder}/" for folder in folders if store.names(folder)]
        if holds:
            raise StorageError(
                f"output.path = {store.url}: holds {holds[0]} but no {plan.JOB_FILE}. {_ALONE}"
            )


_ALONE = "It is no output of sdbatch and is left alone. Choose another path."


def begin(
    store: Store, planned: Plan, kept: Sequence[Receipt], again: Sequence[Receipt], overwrite: bool
) -> None:
    """Remove what is to go, then write plan.parquet and job.yaml.

    Args:
        store: the output.
        planned: with its job resolved.
        kept: receipts of shards that stay.
        again: receipts of shards that are drawn again.
        overwrite: remove all that an earlier job left.
    """
    if overwrite:
        withdraw(store)
    for receipt in again:
        receipts.withdraw(store, receipt)
    plan.write(store, planned)
    receipts.sweep(store, kept)


def end(store: Store, job: Job, every: Sequence[Receipt], report: Report) -> None:
    """Write what stands at the end of a finished output: manifest, gallery, dataset card."""
    receipts.write_manifest(store, every)
    gallery.write(store, job, every)
    card.write(store, job, report)
    receipts.sweep(store, every)


def withdraw(store: Store) -> None:
    """Remove an output's own files; job.yaml goes last, so that a kill leaves no riddle."""
    for folder in (receipts.RECEIPTS, receipts.DATA, receipts.FAILED):
        for name in store.names(folder):
            if receipts.OURS.fullmatch(name) or name.endswith(TEMPORARY):
                store.remove(f"{folder}/{name}")
        store.remove_if_empty(folder)
    for name in (gallery.PAGE, sheet.SHEET_FILE, scores.SCORES_FILE):
        store.remove(name)
    store.remove_if_empty(gallery.FOLDER)
    files = (receipts.MANIFEST_FILE, card.CARD_FILE, PROGRESS_FILE, plan.PLAN_FILE, plan.JOB_FILE)
    for name in files:
        store.remove(name)
    store.remove_if_empty()

"""The output as a whole: make it this job's, end it, take it away. Shards are receipts.py's."""

from collections.abc import Sequence

from sdbatch import plan, receipts
from sdbatch.errors import StorageError
from sdbatch.job import Job
from sdbatch.plan import Plan
from sdbatch.receipts import Receipt
from sdbatch.report import card, gallery
from sdbatch.report.progress import PROGRESS_FILE
from sdbatch.report.summary import Report
from sdbatch.storage import Store


def refuse_foreign(store: Store) -> None:
    """Raise a StorageError if the folder holds files where the output's go, but is no output."""
    if store.find(plan.JOB_FILE) is None:
        for folder in (receipts.DATA, receipts.FAILED, receipts.RECEIPTS):
            if store.names(folder):
                raise StorageError(
                    f"output.path = {store.url}: holds {folder}/ but no {plan.JOB_FILE}, so it is "
                    f"no output of sdbatch and is left alone. Choose another path."
                )


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
    """Remove an output; job.yaml goes last, so that a kill leaves an output and no riddle."""
    for folder in (receipts.RECEIPTS, receipts.DATA, receipts.FAILED, gallery.FOLDER):
        store.remove_folder(folder)
    files = (receipts.MANIFEST_FILE, card.CARD_FILE, PROGRESS_FILE, plan.PLAN_FILE, plan.JOB_FILE)
    for name in files:
        store.remove(name)
    store.remove_if_empty()

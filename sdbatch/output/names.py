"""The names of the files of an output."""

import re

from sdbatch.local_files import TEMPORARY
from sdbatch.schema import shard_name

JOB = "job.yaml"
PLAN = "plan.parquet"
MANIFEST = "manifest.parquet"
CARD = "README.md"
PROGRESS = "progress.json"
GALLERY = "gallery/index.html"
SHEET = "gallery/sheet.jpg"
ANIMATION = "gallery/sheet.webp"
SCORES = "scores.parquet"

DATA, FAILED, RECEIPTS, GALLERY_FOLDER = "data", "failed", "receipts", "gallery"
RUNS = "runs"
SHARD_FOLDERS = (RECEIPTS, DATA, FAILED)  # in the order of their removal

_NUMBERED = re.compile(r"([0-9]{6}|[1-9][0-9]{6,})\.json")
_TEMPORARY = re.compile(rf"\.[0-9a-f]{{32}}{re.escape(TEMPORARY)}")


def data_file(shard: int, suffix: str) -> str:
    """Return the name of the images of a shard."""
    return f"{DATA}/{shard_name(shard)}.{suffix}"


def failed_file(shard: int) -> str:
    """Return the name of the failed rows of a shard."""
    return f"{FAILED}/{shard_name(shard)}.parquet"


def receipt_file(shard: int) -> str:
    """Return the name of the receipt of a shard."""
    return f"{RECEIPTS}/{shard_name(shard)}.json"


def receipt_number(name: str) -> int | None:
    """Return the shard of a file in RECEIPTS; None if it is not a receipt."""
    return _number(name)


def run_file(number: int) -> str:
    """Return the name of the file of a run."""
    return f"{RUNS}/{number:06d}.json"


def run_number(name: str) -> int | None:
    """Return the number of a run by its file in RUNS; None if it is not such a file."""
    return _number(name)


def is_temporary(name: str) -> bool:
    """Tell whether a file is what an interrupted write leaves."""
    return _TEMPORARY.fullmatch(name) is not None


def _number(name: str) -> int | None:
    found = _NUMBERED.fullmatch(name)
    return int(found[1]) if found else None

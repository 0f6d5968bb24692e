"""The names of the files of an output."""

import re

from sdbatch.registry import OUTPUT_FORMATS
from sdbatch.schema import shard_name
from sdbatch.storage import TEMPORARY

JOB = "job.yaml"
PLAN = "plan.parquet"
MANIFEST = "manifest.parquet"
CARD = "README.md"
PROGRESS = "progress.json"
GALLERY = "gallery/index.html"
SHEET = "gallery/sheet.jpg"
SCORES = "scores.parquet"

DATA, FAILED, RECEIPTS, GALLERY_FOLDER = "data", "failed", "receipts", "gallery"
SHARD_FOLDERS = (RECEIPTS, DATA, FAILED)  # in the order of their removal

_SUFFIXES = "|".join(
    sorted({"parquet", "json", *(each.suffix for each in OUTPUT_FORMATS.values())})
)
_SHARD_FILE = re.compile(rf"\d{{6,}}\.({_SUFFIXES})")


def data_file(shard: int, suffix: str) -> str:
    """Return the name of the images of a shard."""
    return f"{DATA}/{shard_name(shard)}.{suffix}"


def failed_file(shard: int) -> str:
    """Return the name of the failed rows of a shard."""
    return f"{FAILED}/{shard_name(shard)}.parquet"


def receipt_file(shard: int) -> str:
    """Return the name of the receipt of a shard."""
    return f"{RECEIPTS}/{shard_name(shard)}.json"


def is_shard_file(name: str) -> bool:
    """Tell whether a file in one of SHARD_FOLDERS has a name that sdbatch gives."""
    return _SHARD_FILE.fullmatch(name) is not None


def is_temporary(name: str) -> bool:
    """Tell whether a file is what an interrupted write leaves."""
    return name.startswith(".") and name.endswith(TEMPORARY)

"""Reads the images of an output: all in order, or some by number."""

import bisect
import io
import itertools
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from PIL import Image

from sdbatch.errors import StorageError, one_line
from sdbatch.job import Job
from sdbatch.output import formats, names, receipts
from sdbatch.output.receipts import Receipt
from sdbatch.output.record import require_record
from sdbatch.storage import Store

# What the formats raise for a damaged file.
READ_ERRORS = (OSError, pa.ArrowException, tarfile.TarError, ValueError, KeyError)


@dataclass(frozen=True, slots=True)
class Images:
    """The drawn images of shards with a receipt, numbered from 0 over all shards in order."""

    store: Store
    job: Job
    receipts: tuple[Receipt, ...]

    def __len__(self) -> int:
        """Return the number of images."""
        return sum(receipt.images for receipt in self.receipts)

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
        """Yield the rows of all images; with `columns`, other columns may be missing."""
        for receipt in self.receipts:
            yield from shard_rows(self.store, receipt, columns)

    def rows_at(self, numbers: Iterable[int]) -> list[dict[str, Any]]:
        """Return the rows of the images with these numbers, in ascending order."""
        ends = list(itertools.accumulate(receipt.images for receipt in self.receipts))
        rows: list[dict[str, Any]] = []
        for shard, group in itertools.groupby(sorted(numbers), lambda n: bisect.bisect(ends, n)):
            receipt = self.receipts[shard]
            start = ends[shard] - receipt.images
            indices = {number - start for number in group}
            first_rows = itertools.islice(shard_rows(self.store, receipt), max(indices) + 1)
            rows += [row for index, row in enumerate(first_rows) if index in indices]
        return rows


def open_images(store: Store) -> Images:
    """Return the images of an output, finished or still being drawn.

    Raises:
        StorageError: there is no output, or it has no image yet.
    """
    record = require_record(store)
    found = receipts.read_receipts(store, record.proof()).values()
    committed = tuple(receipt for receipt in found if isinstance(receipt, Receipt))
    images = Images(store, record.job, committed)
    if not len(images):
        raise StorageError(
            f"{store.url} has no image yet: no shard with a drawn image is committed. Run `sdbatch "
            f"status {store.url}` to see the progress."
        )
    return images


def shard_rows(
    store: Store, receipt: Receipt, columns: Sequence[str] | None = None
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a shard's images; with `columns`, other columns may be missing.

    Raises:
        StorageError: its data file is missing or damaged.
    """
    for file in receipt.files:
        if file.name.startswith(f"{names.DATA}/"):
            with store.open(file.name) as data:
                count = 0
                try:
                    for row in formats.read_shard(data, file.name, columns):
                        yield row
                        count += 1
                    if count != receipt.images:  # a tar that is cut between two members is valid
                        raise ValueError(f"{count} images instead of {receipt.images}")
                except READ_ERRORS as error:
                    raise StorageError(
                        f"{store.where(file.name)}: cannot be read ({one_line(error)}). Run "
                        f"`sdbatch verify {store.url}` to list all damaged files."
                    ) from error


def open_picture(row: dict[str, Any]) -> Image.Image:
    """Return the image of a row in RGB.

    Raises:
        StorageError: it is damaged.
    """
    try:
        with Image.open(io.BytesIO(row["image"]["bytes"])) as image:
            return image.convert("RGB")
    # Pillow raises a SyntaxError or ValueError for a broken PNG
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise StorageError(
            f"image {row['key']}: cannot be decoded ({type(error).__name__}). Run `sdbatch verify` "
            f"to list all damaged files."
        ) from error

"""The drawn images of an output, read back: all in order, or some by number."""

import bisect
import io
import itertools
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from PIL import Image

from sdbatch.errors import StorageError
from sdbatch.job import Job
from sdbatch.output import formats, plan, receipts
from sdbatch.output.receipts import DATA, Receipt
from sdbatch.storage import Store

# What reading a damaged file raises.
_DAMAGES = (OSError, pa.ArrowException, tarfile.TarError, ValueError, KeyError)


@dataclass(frozen=True, slots=True)
class Images:
    """The images that receipts prove, counted from 0 over all shards in order."""

    store: Store
    job: Job
    receipts: tuple[Receipt, ...]

    def __len__(self) -> int:
        """Return how many there are."""
        return sum(receipt.images for receipt in self.receipts)

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
        """Yield their rows; `columns` are all that is needed, Parquet then reads no others."""
        for receipt in self.receipts:
            yield from shard_rows(self.store, receipt, columns)

    def at(self, numbers: Iterable[int]) -> list[dict[str, Any]]:
        """Return the rows of these numbers, sorted."""
        ends = list(itertools.accumulate(receipt.images for receipt in self.receipts))
        found = []
        for shard, group in itertools.groupby(sorted(numbers), lambda n: bisect.bisect(ends, n)):
            receipt = self.receipts[shard]
            wanted = {number - (ends[shard] - receipt.images) for number in group}
            rows = itertools.islice(shard_rows(self.store, receipt), max(wanted) + 1)
            found += [row for number, row in enumerate(rows) if number in wanted]
        return found


def open_images(store: Store) -> Images:
    """Return the images of an output, finished or still being drawn.

    Raises:
        StorageError: there is no output, or no shard of it with an image is committed.
    """
    begun = plan.read(store)
    if begun is None:
        raise StorageError(f"{store.url} = no {plan.JOB_FILE}: must be the output of a job.")
    every = receipts.read_all(store, receipts.committed(store))
    images = Images(store, begun.job, tuple(every))
    if not len(images):
        raise StorageError(
            f"{store.url} = no image yet: must have a committed shard with one. `sdbatch status "
            f"{store.url}` tells how far it is."
        )
    return images


def shard_rows(
    store: Store, receipt: Receipt, columns: Sequence[str] | None = None
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a shard's images; of `columns` alone, where they are given and Parquet.

    Raises:
        StorageError: its file is missing or damaged.
    """
    for file in receipt.files:
        if file["name"].startswith(f"{DATA}/"):
            with store.open(file["name"]) as opened:
                count = 0
                try:
                    for row in formats.read(opened, file["name"], columns):
                        yield row
                        count += 1
                    if count != receipt.images:  # a tar that is cut between two members ends there
                        raise ValueError(f"{count} images, and not {receipt.images}")
                except _DAMAGES as error:
                    raise StorageError(
                        f"{store.where(file['name'])} = cannot be read "
                        f"({' '.join(str(error).split())}): must be as it was written. `sdbatch "
                        f"verify {store.url}` tells what is damaged."
                    ) from error


def picture(row: dict[str, Any]) -> Image.Image:
    """Return the image of a row in RGB.

    Raises:
        StorageError: it is damaged.
    """
    try:
        with Image.open(io.BytesIO(row["image"]["bytes"])) as image:
            return image.convert("RGB")
    # a SyntaxError or ValueError is how Pillow calls a broken PNG
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise StorageError(
            f"image {row['key']} = no picture ({type(error).__name__}): must be as it was written. "
            f"`sdbatch verify` tells what is damaged."
        ) from error

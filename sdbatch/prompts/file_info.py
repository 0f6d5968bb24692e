"""What one pass over a file of a prompt table finds, and how its errors are reported.

Shared by all formats.
"""

import contextlib
import lzma
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

from sdbatch.errors import PromptTableError, one_line
from sdbatch.prompts.sizes import Sizes

# Bounds, so that a few compressed bytes cannot fill the memory of a machine.
MOST_ROW = 64 * 2**20  # characters or bytes of a row, and of a value in it
MOST_ROWS = 512 * 2**20  # of the rows of one shard together
PHOTO_BYTES = 16 * 2**20  # of rows with pictures that are held at once, on average
MOST_PICTURE = 128 * 2**20  # bytes of a picture's file
_DECODERS = (pa.ArrowException, EOFError, UnicodeDecodeError, zlib.error, lzma.LZMAError)


@dataclass(frozen=True)
class FileInfo:
    """The size and columns of a file: from its footer for Parquet, else by reading all of it."""

    rows: int
    schema: pa.Schema
    checksum: str  # Parquet: of size and footer; others: of all bytes
    sizes: Sizes
    format: str  # of job.TABLE_FORMATS


def check_row_count(url: str, rows: int, stop: int) -> None:
    """Raise a PromptTableError if a file of `rows` rows ends before row `stop`."""
    if rows < stop:
        raise PromptTableError(
            f"{url} = ends before row {stop}: must have its rows as when the table was opened. "
            f"Restore the file."
        )


def row_too_long(where: str) -> PromptTableError:
    """Return the error of a row that is larger than MOST_ROW."""
    return PromptTableError(
        f"{where} = more than {MOST_ROW // 2**20} MiB: a row must be smaller. Leave the long "
        f"value out of the table."
    )


def check_size(url: str, start: int, stop: int, size: int) -> None:
    """Raise a PromptTableError if rows [start, stop) are larger than MOST_ROWS."""
    if size > MOST_ROWS:
        raise PromptTableError(
            f"{url} rows {start} to {stop} = more than {MOST_ROWS // 2**20} MiB: the rows of a "
            f"shard must be smaller, as they are in memory. Set a smaller output.images_per_shard."
        )


@contextlib.contextmanager
def decoding_errors(where: str, expected: str) -> Iterator[None]:
    """Turn what a decoder raises in the block into a PromptTableError that names `expected`.

    An OSError with an errno comes from the filesystem, not from a decoder, and passes unchanged.
    """
    try:
        yield
    except (*_DECODERS, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise PromptTableError(f"{where} = {one_line(error)}: must be {expected}.") from error

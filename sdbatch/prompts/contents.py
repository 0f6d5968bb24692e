"""What is in a file of a prompt table, and how its faults are told; shared by all formats."""

import contextlib
import lzma
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

from sdbatch.errors import PromptTableError

MIXED = {b"sdbatch": b"json text"}  # metadata of a field whose values are kept as JSON text


@dataclass(frozen=True)
class Contents:
    """What is in a file: found without its prompts for Parquet, by one pass for the others."""

    rows: int
    schema: pa.Schema
    checksum: str  # Parquet: of size and footer; others: of all bytes


def unite(one: pa.Schema, two: pa.Schema) -> pa.Schema:
    """Unite the columns of two files or parts of one; JSON text in one is JSON text in both.

    Raises:
        pa.ArrowException: a column's types cannot be united.
    """
    names = {field.name for field in (*one, *two) if field.metadata == MIXED}

    def marked(schema: pa.Schema) -> pa.Schema:
        return pa.schema([mixed(f.name) if f.name in names else f for f in schema])

    return pa.unify_schemas([marked(one), marked(two)], promote_options="permissive")


def mixed(name: str) -> pa.Field:
    """Return the column `name` whose values are kept as JSON text."""
    return pa.field(name, pa.string(), metadata=MIXED)


def check_end(url: str, rows: int, stop: int) -> None:
    """Raise a PromptTableError if a file of `rows` rows does not reach to row `stop`."""
    if rows < stop:
        raise PromptTableError(
            f"{url} = {rows} rows: had {stop} at least, and must not change while read."
        )


@contextlib.contextmanager
def faults(url: str, must: str) -> Iterator[None]:
    """Tell a broken file from a store out of reach: what a decoder raises has no errno."""
    try:
        yield
    except (pa.ArrowException, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise PromptTableError(f"{url} = {line(error)}: must be {must}.") from error


def line(error: Exception) -> str:
    """Return an error's text in one line."""
    return " ".join(str(error).split())

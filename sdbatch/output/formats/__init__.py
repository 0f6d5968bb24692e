"""A shard as a file, in one of the registry's output formats.

The module of a format has

    write(rows, output) -> file              rows with the columns of schema.images
    read(file, columns) -> rows              from the beginning, without holding all of them
    card_features(output) -> front matter    what the dataset card must say of the types
"""

from collections.abc import Iterator, Sequence
from typing import IO, Any

import pyarrow as pa

from sdbatch import registry
from sdbatch.job import Output
from sdbatch.registry import OUTPUT_FORMATS


def write_shard(rows: pa.Table, output: Output) -> bytes | memoryview:
    """Return a shard's file; `rows` has the columns of schema.images."""
    data: bytes | memoryview = _module(output.format).write(rows, output)
    return data


def suffix(output: Output) -> str:
    """Return the suffix of the shards' files."""
    return OUTPUT_FORMATS[output.format].suffix


def read_shard(
    file: IO[bytes], name: str, columns: Sequence[str] | None = None
) -> Iterator[dict[str, Any]]:
    """Yield the rows of the shard file `name` from its beginning, a few in memory at a time.

    `columns` are all that is needed: a format that can skips the others. Raises ValueError for a
    file of no format.
    """
    ending = name.rpartition(".")[2]
    modules = [each.module for each in OUTPUT_FORMATS.values() if each.suffix == ending]
    if not modules:
        raise ValueError(f"no format has the suffix {ending!r}")
    rows: Iterator[dict[str, Any]] = registry.load(modules[0]).read(file, columns)
    return rows


def card_features(output: Output) -> dict[str, Any]:
    """Return what the dataset card must say of the types of the columns."""
    features: dict[str, Any] = _module(output.format).card_features(output)
    return features


def _module(name: str) -> Any:
    return registry.load(OUTPUT_FORMATS[name].module)

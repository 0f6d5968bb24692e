"""A shard as bytes: image files with their parameters inside, in Parquet or WebDataset."""

from collections.abc import Iterator, Sequence
from typing import IO, Any

import pyarrow as pa

from sdbatch.job import Output
from sdbatch.output.formats import parquet, webdataset


def write(rows: pa.Table, output: Output) -> tuple[str, bytes]:
    """Return the suffix and the bytes of a shard; `rows` has the columns of schema.images."""
    if output.format == "parquet":
        return "parquet", parquet.write(rows)
    return "tar", webdataset.write(rows, output.image_format)


def read(
    file: IO[bytes], name: str, columns: Sequence[str] | None = None
) -> Iterator[dict[str, Any]]:
    """Yield the rows of the shard file `name` from its beginning, without holding all of them.

    `columns` are all that is needed: Parquet then reads no others.
    """
    return parquet.read(file, columns) if name.endswith(".parquet") else webdataset.read(file)

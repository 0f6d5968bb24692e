"""A Parquet file of a prompt table: typed, known by its footer, read by row group."""

import hashlib
import io
from collections.abc import Iterator
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from sdbatch import storage
from sdbatch.prompts.contents import Contents, check_end, faults

BATCH = 10_000  # rows decoded at once


def look(url: str) -> Contents:
    """Count the rows of the file at `url` and find its columns, from its footer."""
    with storage.open_file(url) as file, faults(url, "a Parquet file"):
        metadata = pq.read_metadata(file)
        schema = metadata.schema.to_arrow_schema().remove_metadata()
        found = _footer_checksum(file, metadata)
    schema = pa.schema([pa.field(field.name, _without_views(field.type)) for field in schema])
    return Contents(metadata.num_rows, schema, found)


def checksum(url: str) -> str:
    """Return the hash of the file's size and footer: column chunks' sizes and ranges."""
    with storage.open_file(url) as file, faults(url, "a Parquet file"):
        return _footer_checksum(file, pq.read_metadata(file))


def read(url: str, start: int, stop: int, schema: pa.Schema) -> pa.Table:
    """Return rows [start, stop) with the columns of `schema`; those it lacks are null."""
    with storage.open_file(url) as file, faults(url, "a Parquet file"):
        parquet = pq.ParquetFile(file)
        check_end(url, parquet.metadata.num_rows, stop)
        columns = [name for name in schema.names if name in parquet.schema_arrow.names]
        table = pa.concat_tables(_slices(parquet, start, stop, columns))
    arrays = []
    for field in schema:
        with faults(f"{url} column {field.name!r}", f"{field.type}, as the other files say"):
            if field.name not in columns:
                arrays.append(pa.nulls(stop - start, field.type))
            elif table[field.name].type == field.type:  # casting breaks slices of nested nulls
                arrays.append(table[field.name])
            else:
                arrays.append(table[field.name].cast(field.type))
    return pa.table(arrays, schema=schema)


def _slices(
    parquet: pq.ParquetFile, start: int, stop: int, columns: list[str]
) -> Iterator[pa.Table]:
    """Yield rows [start, stop) piece by piece; a row group is never decoded whole."""
    first = 0
    for group in range(parquet.num_row_groups):
        last = first + parquet.metadata.row_group(group).num_rows
        if first < stop and last > start:
            at = first
            for batch in parquet.iter_batches(BATCH, row_groups=[group], columns=columns):
                low, high = max(start - at, 0), min(stop - at, batch.num_rows)
                if low < high:
                    yield pa.Table.from_batches([batch.slice(low, high - low)])
                at += batch.num_rows
                if at >= stop:
                    return
        first = last


def _footer_checksum(file: IO[bytes], metadata: pq.FileMetaData) -> str:
    size = file.seek(0, io.SEEK_END)
    file.seek(-(metadata.serialized_size + 8), io.SEEK_END)
    return hashlib.sha256(f"{size} ".encode() + file.read()).hexdigest()


def _without_views(kind: pa.DataType) -> pa.DataType:
    """Return the type that Arrow's other functions know for a view type."""
    if pa.types.is_string_view(kind):
        return pa.string()
    return pa.binary() if pa.types.is_binary_view(kind) else kind

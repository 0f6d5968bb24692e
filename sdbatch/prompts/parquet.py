"""A Parquet file of a prompt table: its footer gives rows and columns; read by row group."""

import hashlib
import io
from collections.abc import Iterator
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from sdbatch import storage
from sdbatch.prompts.file_info import FileInfo, check_row_count, decoding_errors

BATCH_ROWS = 10_000  # rows decoded at once


def inspect_file(url: str) -> FileInfo:
    """Count the rows of the file at `url` and find its columns, from its footer."""
    with storage.open_file(url) as file, decoding_errors(url, "a Parquet file"):
        metadata = pq.read_metadata(file)
        schema = metadata.schema.to_arrow_schema().remove_metadata()
        footer_checksum = _footer_checksum(file, metadata)
    schema = pa.schema([pa.field(field.name, _plain_type(field.type)) for field in schema])
    return FileInfo(metadata.num_rows, schema, footer_checksum)


def checksum(url: str) -> str:
    """Return the hash of the file's size and its footer, which holds sizes and statistics."""
    with storage.open_file(url) as file, decoding_errors(url, "a Parquet file"):
        return _footer_checksum(file, pq.read_metadata(file))


def read_rows(url: str, start: int, stop: int, schema: pa.Schema) -> pa.Table:
    """Return rows [start, stop) with the columns of `schema`; missing ones are null."""
    with storage.open_file(url) as file, decoding_errors(url, "a Parquet file"):
        parquet = pq.ParquetFile(file)
        check_row_count(url, parquet.metadata.num_rows, stop)
        columns = [name for name in schema.names if name in parquet.schema_arrow.names]
        table = pa.concat_tables(_read_batches(parquet, start, stop, columns))
    arrays = []
    for field in schema:
        with decoding_errors(
            f"{url} column {field.name!r}", f"{field.type}, as in the other files"
        ):
            if field.name not in columns:
                arrays.append(pa.nulls(stop - start, field.type))
            elif table[field.name].type == field.type:  # a cast breaks slices of nested nulls
                arrays.append(table[field.name])
            else:
                arrays.append(table[field.name].cast(field.type))
    return pa.table(arrays, schema=schema)


def _read_batches(
    parquet: pq.ParquetFile, start: int, stop: int, columns: list[str]
) -> Iterator[pa.Table]:
    """Yield rows [start, stop) in batches, so that no row group is decoded whole."""
    group_start = 0
    for group in range(parquet.num_row_groups):
        group_stop = group_start + parquet.metadata.row_group(group).num_rows
        if group_start < stop and group_stop > start:
            batch_start = group_start
            for batch in parquet.iter_batches(BATCH_ROWS, row_groups=[group], columns=columns):
                low, high = max(start - batch_start, 0), min(stop - batch_start, batch.num_rows)
                if low < high:
                    yield pa.Table.from_batches([batch.slice(low, high - low)])
                batch_start += batch.num_rows
                if batch_start >= stop:
                    return
        group_start = group_stop


def _footer_checksum(file: IO[bytes], metadata: pq.FileMetaData) -> str:
    size = file.seek(0, io.SEEK_END)
    file.seek(-(metadata.serialized_size + 8), io.SEEK_END)
    return hashlib.sha256(f"{size} ".encode() + file.read()).hexdigest()


def _plain_type(arrow_type: pa.DataType) -> pa.DataType:
    """Return string for string_view and binary for binary_view, which few functions support."""
    if pa.types.is_string_view(arrow_type):
        return pa.string()
    return pa.binary() if pa.types.is_binary_view(arrow_type) else arrow_type

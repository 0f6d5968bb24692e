"""A Parquet file of a prompt table: its footer gives rows and columns; read by row group."""

import hashlib
import io
import itertools
import re
from collections.abc import Iterator
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from sdbatch import storage
from sdbatch.errors import PromptTableError
from sdbatch.prompts.extras import with_features
from sdbatch.prompts.file_info import (
    MOST_ROW,
    PHOTO_BYTES,
    FileInfo,
    check_row_count,
    check_size,
    decoding_errors,
    row_too_long,
)
from sdbatch.prompts.fit import check_values, fit
from sdbatch.prompts.sizes import Sizes, read_side
from sdbatch.prompts.types import plain_type

BATCH_ROWS = 10_000  # decoded at once
BATCH_BYTES = 2**28  # of them, if every row held the largest value that rows can share
_BUFFER = 2**20  # of a column chunk of pictures: it is read in parts of that many bytes


def inspect_file(url: str, sides: tuple[str, str]) -> FileInfo:
    """Count the rows of the file at `url` and find columns and sizes, from its footer."""
    with storage.open_file(url) as file, decoding_errors(url, "a Parquet file"):
        metadata = pq.read_metadata(file)
        schema = metadata.schema.to_arrow_schema()
        footer_checksum = _footer_checksum(file, metadata)
        sizes = _find_sizes(file, url, metadata, sides)
    groups = sum(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
    if groups != metadata.num_rows:
        raise PromptTableError(
            f"{url} = a footer with {metadata.num_rows:,} rows, and {groups:,} in its row groups: "
            f"must be as it was written. Write the file again."
        )
    fields = pa.schema([pa.field(field.name, plain_type(field.type)) for field in schema])
    columns = with_features(fields, schema.metadata)
    return FileInfo(metadata.num_rows, columns, footer_checksum, sizes, "parquet")


def _find_sizes(
    file: IO[bytes], url: str, metadata: pq.FileMetaData, sides: tuple[str, str]
) -> Sizes:
    """Return the largest sizes that the statistics of the row groups allow.

    The two columns of a row group are read if its statistics do not say the largest valid side.
    """
    sizes = Sizes()
    paths = [metadata.schema.column(number).path for number in range(metadata.num_columns)]
    present = {name: paths.index(name) for name in sides if name in paths}
    parquet = pq.ParquetFile(file, metadata=metadata)
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        heights, widths = (
            _sides_of(group.column(present[name])) if name in present else {None} for name in sides
        )
        if heights and widths:
            for size in itertools.product(heights, widths):
                sizes.add(size)
            continue
        rows = _batch_rows(file, group, list(present), f"{url} row group {number}")
        for batch in parquet.iter_batches(rows, row_groups=[number], columns=list(present)):
            nulls = [None] * batch.num_rows
            cells = [batch[name].to_pylist() if name in present else nulls for name in sides]
            for height, width in zip(*cells, strict=True):
                sizes.add_row(height, width)
    return sizes


def _sides_of(chunk: pq.ColumnChunkMetaData) -> set[int | None]:
    """Return the largest side in a chunk, and None if some have none; empty: not known."""
    statistics = chunk.statistics
    if statistics is None or not statistics.has_null_count:
        return set()
    sides: set[int | None] = {None} if statistics.null_count else set()
    if statistics.null_count == chunk.num_values:
        return sides
    if not statistics.has_min_max or statistics.logical_type.type not in ("NONE", "INT"):
        return set()
    if chunk.physical_type == "BYTE_ARRAY":
        return set()  # text, of which "64" comes after "512"
    try:
        return {*sides, read_side(statistics.max)}
    except ValueError:
        return set()


def checksum(url: str) -> str:
    """Return the hash of the file's size and its footer, which holds sizes and statistics."""
    with storage.open_file(url) as file, decoding_errors(url, "a Parquet file"):
        return _footer_checksum(file, pq.read_metadata(file))


def read_rows(url: str, start: int, stop: int, schema: pa.Schema) -> pa.Table:
    """Return rows [start, stop) with the columns of `schema`; missing ones are null."""
    with storage.open_file(url) as file, decoding_errors(url, "a Parquet file"):
        metadata = pq.read_metadata(file)
        check_row_count(url, metadata.num_rows, stop)
        present = metadata.schema.to_arrow_schema().names
        columns = [name for name in schema.names if name in present]
        batches = list(_read_batches(file, url, start, stop, columns))
    check_row_count(url, start + sum(batch.num_rows for batch in batches), stop)
    return fit(batches, schema, start, url)


def iter_tables(url: str, schema: pa.Schema) -> Iterator[pa.Table]:
    """Yield all rows of a file with the columns of `schema`, a few in memory at a time."""
    start = 0
    with storage.open_file(url) as file, decoding_errors(url, "a Parquet file"):
        metadata = pq.read_metadata(file)
        present = metadata.schema.to_arrow_schema().names
        columns = [name for name in schema.names if name in present]
        for batch in _read_batches(file, url, 0, metadata.num_rows, columns, together=False):
            yield fit([batch], schema, start, url)
            start += batch.num_rows


def iter_rows(url: str, span: tuple[int, int], schema: pa.Schema) -> Iterator[pa.Table]:
    """Yield rows [start, stop) with the columns of `schema`, PHOTO_BYTES in memory at a time."""
    start, stop = span
    with storage.open_file(url) as file, decoding_errors(url, "a Parquet file"):
        parquet = pq.ParquetFile(file, buffer_size=_BUFFER)
        present = parquet.schema_arrow.names
        columns = [name for name in schema.names if name in present]
        group_start = 0
        for group in range(parquet.num_row_groups):
            metadata = parquet.metadata.row_group(group)
            first, group_start = group_start, group_start + metadata.num_rows
            if first >= stop or group_start <= start:
                continue
            rows = _photo_rows(file, metadata, columns, f"{url} row group {group}")
            for batch in parquet.iter_batches(rows, row_groups=[group], columns=columns):
                low, high = max(start - first, 0), min(stop - first, batch.num_rows)
                if low < high:
                    yield fit([batch.slice(low, high - low)], schema, first + low, url)
                first += batch.num_rows
                if first >= stop:
                    return


def _photo_rows(file: IO[bytes], group: pq.RowGroupMetaData, columns: list[str], where: str) -> int:
    """Return how many rows of a row group with pictures may be decoded at once."""
    chunks = [group.column(number) for number in range(group.num_columns)]
    names = tuple(f"{name}." for name in columns)
    size = sum(
        chunk.total_uncompressed_size
        for chunk in chunks
        if f"{chunk.path_in_schema}.".startswith(names)
    )
    each = size // max(1, group.num_rows)
    rows = _batch_rows(file, group, columns, where)
    return max(1, min(rows, PHOTO_BYTES // max(1, int(each))))


def _read_batches(
    file: IO[bytes], url: str, start: int, stop: int, columns: list[str], together: bool = True
) -> Iterator[pa.RecordBatch]:
    """Yield rows [start, stop) in batches, so that no row group is decoded whole.

    `together`: all of them will be in memory, so their size is limited.
    """
    parquet = pq.ParquetFile(file)
    group_start = size = 0
    for group in range(parquet.num_row_groups):
        metadata = parquet.metadata.row_group(group)
        group_stop = group_start + metadata.num_rows
        if group_start < stop and group_stop > start:
            batch_start = group_start
            rows = _batch_rows(file, metadata, columns, f"{url} row group {group}")
            for batch in parquet.iter_batches(rows, row_groups=[group], columns=columns):
                low, high = max(start - batch_start, 0), min(stop - batch_start, batch.num_rows)
                if low < high:
                    part = batch.slice(low, high - low)
                    size += check_values(part, batch_start + low, url)
                    if together:
                        check_size(url, start, stop, size)
                    yield part
                batch_start += batch.num_rows
                if batch_start >= stop:
                    return
        group_start = group_stop


def _batch_rows(file: IO[bytes], group: pq.RowGroupMetaData, columns: list[str], where: str) -> int:
    """Return how many rows of a row group may be decoded at once.

    A file of some hundred bytes can hold 10 MB in each of a million rows: as a number in a
    dictionary, or as the same beginning as that of the row before.

    Raises:
        PromptTableError: the rows are too large on average.
    """
    rows, group_rows = BATCH_ROWS, max(1, group.num_rows)
    for number in range(group.num_columns):
        chunk = group.column(number)
        if not any(f"{chunk.path_in_schema}.".startswith(f"{name}.") for name in columns):
            continue
        size = chunk.total_uncompressed_size
        if max(size, 8 * chunk.num_values) // group_rows > MOST_ROW:
            raise row_too_long(f"{where} column {chunk.path_in_schema!r}")
        if not any(encoding.startswith("DELTA") for encoding in chunk.encodings):
            size = _dictionary_bytes(file, chunk)
        values = -(-chunk.num_values // group_rows)  # of a list in a row, on average
        rows = min(rows, BATCH_BYTES // max(1, size * values))
    return max(1, rows)


def _dictionary_bytes(file: IO[bytes], chunk: pq.ColumnChunkMetaData) -> int:
    """Return the size of a chunk's dictionary, which no value in it can exceed; 0: it has none.

    From the header of its page, the second number in Thrift's compact protocol:
    https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift
    """
    if not chunk.has_dictionary_page:
        return 0
    file.seek(chunk.dictionary_page_offset)
    numbers = re.fullmatch(
        rb"\x15[\x80-\xff]*[\x00-\x7f]\x15([\x80-\xff]*[\x00-\x7f]).*", file.read(32), re.DOTALL
    )
    if numbers is None:
        return int(chunk.total_uncompressed_size)
    varint = sum((byte & 0x7F) << 7 * place for place, byte in enumerate(numbers[1]))
    return int(varint >> 1)  # zigzag


def _footer_checksum(file: IO[bytes], metadata: pq.FileMetaData) -> str:
    size = file.seek(0, io.SEEK_END)
    file.seek(-(metadata.serialized_size + 8), io.SEEK_END)
    return hashlib.sha256(f"{size} ".encode() + file.read()).hexdigest()

"""Columns of a Parquet or Arrow file as the table has them, and checks of their values.

Only rows [start, stop) of a file come here, so what they need together is known before it is made.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sdbatch.prompts.file_info import MOST_ROW, decoding_errors, row_too_long
from sdbatch.prompts.rows import FAULT
from sdbatch.prompts.types import convert

_TEXT = (pa.StringArray, pa.LargeStringArray, pa.BinaryArray, pa.LargeBinaryArray)


def check_values(batch: pa.RecordBatch, first_row: int, url: str) -> int:
    """Return the bytes of the values in a batch.

    Raises:
        PromptTableError: one of them is too long.
    """
    size = 0
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        encoded = pa.types.is_dictionary(column.type)
        values = column.dictionary if encoded else column
        if isinstance(values, (pa.StringViewArray, pa.BinaryViewArray)):
            lengths = _view_lengths(values)
        elif isinstance(values, _TEXT):
            lengths = pc.binary_length(values)
        else:
            size += column.nbytes
            continue
        lengths = lengths.take(column.indices) if encoded else lengths
        longest = pc.max(lengths).as_py() or 0
        if longest > MOST_ROW:
            row = first_row + pc.index(lengths, longest).as_py()
            raise row_too_long(f"{url} row {row} column {name!r}")
        size += pc.sum(lengths).as_py() or 0
    return size


def _view_lengths(values: pa.Array) -> pa.Array:
    """Return the lengths of a string_view or binary_view column: the first 4 of 16 bytes each.

    Many views can share the bytes of one long value.
    """
    views = np.frombuffer(values.buffers()[1], np.int32)[::4]
    lengths = pa.array(views[values.offset : values.offset + len(values)], pa.int32())
    return pc.if_else(values.is_valid(), lengths, None)


def fit(batches: list[pa.RecordBatch], schema: pa.Schema, start: int, url: str) -> pa.Table:
    """Return batches with the columns of `schema`, and FAULT if a row's text is not UTF-8.

    Args:
        batches: of a file, with all of its columns that are in `schema`.
        schema: missing columns are null.
        start: the number of the first row in the file.
        url: of the file.

    Raises:
        PromptTableError: a column does not fit its type without loss.
    """
    present = batches[0].schema.names if batches else []
    table = pa.Table.from_batches(batches) if batches else pa.table({})
    count = sum(batch.num_rows for batch in batches)
    faults: dict[int, str] = {}
    columns = []
    for field in schema:
        expected = f"{field.type}, as in the other files"
        with decoding_errors(f"{url} column {field.name!r}", expected):
            if field.name in present:
                values = _valid(table[field.name], field.name, start, faults)
                columns.append(convert(values, field))
            else:
                columns.append(pa.nulls(count, field.type))
    fitted = pa.table(columns, schema=schema)
    if faults:
        reasons = pa.array([faults.get(row) for row in range(count)], pa.string())
        fitted = fitted.append_column(FAULT, reasons)
    return fitted


def _valid(
    values: pa.ChunkedArray, name: str, start: int, faults: dict[int, str]
) -> pa.ChunkedArray:
    """Return a column with null where its text is not UTF-8; note the rows in `faults`.

    Raises:
        pa.ArrowInvalid: the column is damaged in another way.
    """
    try:
        values.validate(full=True)
    except pa.ArrowInvalid as error:
        if "UTF8" not in str(error):
            raise
    else:
        return values
    good = [True] * len(values)
    for row, value in enumerate(values):
        try:
            value.as_py()
        except UnicodeDecodeError:
            good[row] = False
            faults[row] = f"row {start + row} column {name!r} = bytes that are not UTF-8"
    return pc.if_else(pa.chunked_array([pa.array(good)]), values, None)

"""Columns as values of JSON, by one rule for each type, whatever Python's own types can hold.

whole numbers, true and false, text   as they are; floats too, but NaN and infinity are null
decimals                              text, all digits
dates, times                          text, ISO 8601, with as many digits as the type has
timestamps                            the same; those with a time zone in UTC, with +00:00
durations                             text, ISO 8601, in seconds
bytes                                 text, base64
lists, structs, maps                  lists, objects, lists of objects with key and value
"""

import base64
import math
from collections.abc import Iterator
from decimal import Decimal
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sdbatch.prompts.types import is_binary

_DIGITS = {"s": 0, "ms": 3, "us": 6, "ns": 9}


def plain_rows(rows: pa.Table, at_a_time: int) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table, of which only `at_a_time` are Python objects at once."""
    for batch in rows.to_batches(max_chunksize=at_a_time):
        columns = [plain_values(column) for column in batch.columns]
        for values in zip(*columns, strict=True):
            yield dict(zip(rows.column_names, values, strict=True))


def plain_values(column: pa.Array) -> list[Any]:
    """Return the values of a column as JSON can hold them."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        return plain_values(column.dictionary_decode())
    if isinstance(kind, pa.BaseExtensionType):
        return plain_values(column.storage)
    if pa.types.is_struct(kind):
        return _plain_structs(column)
    if pa.types.is_map(kind):
        pairs = [("key", kind.key_type), ("value", kind.item_type)]
        return plain_values(column.cast(pa.list_(pa.struct(pairs))))
    if pa.types.is_nested(kind):
        return _plain_lists(column)
    if pa.types.is_temporal(kind):
        return _plain_times(column)
    if pa.types.is_floating(kind):
        values = column.to_pylist()
        return [v if v is not None and math.isfinite(v) else None for v in values]
    if pa.types.is_decimal(kind):
        return [None if value is None else f"{value:f}" for value in column.to_pylist()]
    if is_binary(kind):
        return [
            None if value is None else base64.b64encode(value).decode()
            for value in column.to_pylist()
        ]
    return list(column.to_pylist())


def _plain_structs(column: pa.Array) -> list[Any]:
    names = [column.type.field(number).name for number in range(column.type.num_fields)]
    fields = [plain_values(column.field(number)) for number in range(len(names))]
    valid = column.is_valid().to_pylist()
    rows = zip(*fields, strict=True) if fields else ((),) * len(valid)
    return [
        dict(zip(names, values, strict=True)) if known else None
        for known, values in zip(valid, rows, strict=True)
    ]


def _plain_lists(column: pa.Array) -> list[Any]:
    lengths = pc.list_value_length(column).to_pylist()
    values = iter(plain_values(pc.list_flatten(column)))
    return [
        None if known is None else list(islice(values, known))
        for known in _lengths_of(column, lengths)
    ]


def _lengths_of(column: pa.Array, lengths: list[int | None]) -> list[int | None]:
    """Return the lengths of lists; Arrow gives a null of fixed size a length."""
    valid = column.is_valid().to_pylist()
    return [length if known else None for known, length in zip(valid, lengths, strict=True)]


def _plain_times(column: pa.Array) -> list[Any]:
    unit: Any
    kind = column.type
    if pa.types.is_time(kind):
        return list(column.cast(pa.string()).to_pylist())
    unit = "D" if pa.types.is_date32(kind) else "ms" if pa.types.is_date64(kind) else kind.unit
    storage = pa.int32() if pa.types.is_date32(kind) else pa.int64()
    counts = column.view(storage).to_pylist()
    if pa.types.is_duration(kind):
        digits = _DIGITS[unit]
        return [None if n is None else f"PT{Decimal(n).scaleb(-digits):f}S" for n in counts]
    if pa.types.is_date64(kind):
        unit, counts = "D", [None if n is None else n // 86_400_000 for n in counts]
    zone = "+00:00" if pa.types.is_timestamp(kind) and kind.tz is not None else ""
    # numpy writes years that Python's datetime does not have.
    return [None if n is None else f"{np.datetime64(n, unit)}{zone}" for n in counts]

"""The table's own columns in the output: types that every reader of the output opens.

The readers are pyarrow, pandas, DuckDB, Polars, datasets, webdataset and Ray Data. A type that one
of them cannot open is written as the nearest type that holds the same values, or refused when the
job is planned. Values are converted as columns: none becomes a Python object.
"""

import json
import zoneinfo
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sdbatch.errors import PromptTableError
from sdbatch.schema import FEATURE

_MOST_DIGITS = 38  # of a decimal in Polars


def output_field(field: pa.Field) -> pa.Field:
    """Return the field of the output for a column of the table.

    Raises:
        PromptTableError: no type of the output holds its values.
    """
    try:
        kind = _output_type(field.type)
    except _NoType as error:
        raise PromptTableError(
            f"column {field.name!r} = {error}: must have a type that all readers of the output "
            f"open. Leave it out with prompts.keep, or convert it, for example to text."
        ) from error
    feature = (field.metadata or {}).get(FEATURE)
    same = feature is not None and kind == field.type
    return pa.field(field.name, kind, metadata={FEATURE: feature} if same else None)


def to_output(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    """Return a column of the table with the type that `output_field` gave."""
    if column.type == kind:
        return column
    return pa.chunked_array([_convert(chunk, kind) for chunk in column.chunks], kind)


def _convert(values: pa.Array, kind: pa.DataType) -> pa.Array:
    if pa.types.is_run_end_encoded(values.type):
        values = pc.run_end_decode(values)
    if _is_list_view(values.type):  # Arrow casts its nulls wrongly
        lengths = pc.list_value_length(values)
        ends = np.cumsum(lengths.fill_null(0).to_numpy(zero_copy_only=False), dtype=np.int64)
        empty = lengths.is_null().to_numpy(zero_copy_only=False)
        starts = pa.array(np.concatenate([[0], ends]), mask=np.append(empty, False))
        values = pa.LargeListArray.from_arrays(starts, pc.list_flatten(values))
    if pa.types.is_dictionary(values.type):  # Arrow cannot decode one of views
        return values.dictionary.cast(kind).take(values.indices)
    return values.cast(kind)


class _NoType(ValueError):
    """A type that is in no way part of the output."""


def _is_list_view(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind))


def _output_type(kind: pa.DataType, inside: bool = False) -> pa.DataType:
    """Return the type of the output for a type of the table; `inside` another type."""
    if isinstance(kind, pa.BaseExtensionType):
        return _output_type(kind.storage_type, inside)
    if pa.types.is_dictionary(kind):
        values = _output_type(kind.value_type, inside=True)
        return kind if values == kind.value_type else values
    if pa.types.is_run_end_encoded(kind) and not inside:
        return _output_type(kind.value_type, inside=True)
    nested = _output_nested(kind, inside)
    return nested if nested is not None else _output_leaf(kind)


def _output_nested(kind: pa.DataType, inside: bool) -> pa.DataType | None:
    if pa.types.is_map(kind):
        pairs = [("key", kind.key_type), ("value", kind.item_type)]
        return pa.list_(
            pa.struct([(name, _output_type(each, inside=True)) for name, each in pairs])
        )
    if pa.types.is_struct(kind):
        if not kind.num_fields:
            raise _NoType("a struct without fields")
        fields = [kind.field(number) for number in range(kind.num_fields)]
        return pa.struct([f.with_type(_output_type(f.type, inside=True)) for f in fields])
    lists: list[tuple[bool, Any]] = [
        (pa.types.is_list(kind), pa.list_),
        (pa.types.is_large_list(kind), pa.large_list),
        (pa.types.is_list_view(kind) and not inside, pa.list_),
        (pa.types.is_large_list_view(kind) and not inside, pa.large_list),
        (pa.types.is_fixed_size_list(kind), lambda value: pa.list_(value, kind.list_size)),
    ]
    for is_kind, make in lists:
        if is_kind:
            value = kind.value_field
            inner = _output_type(value.type, inside=True)
            if pa.types.is_fixed_size_binary(inner):
                inner = pa.binary()  # pandas reads no fixed size within a list
            return make(value.with_type(inner))
    return None


def _output_leaf(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_binary_view(kind):
        return pa.binary()
    if pa.types.is_time64(kind) and kind.unit == "ns":
        return pa.string()  # pandas reads no nanoseconds of a time
    if pa.types.is_decimal(kind) and kind.precision <= _MOST_DIGITS:
        return pa.decimal128(kind.precision, kind.scale)
    if pa.types.is_timestamp(kind) and kind.tz is not None and not _is_known(kind.tz):
        return pa.timestamp(kind.unit, "UTC")  # the same instants
    other = (
        pa.types.is_nested(kind),
        pa.types.is_decimal(kind),
        pa.types.is_interval(kind),
        pa.types.is_run_end_encoded(kind),
    )
    if any(other):
        raise _NoType(str(kind))
    return kind


@lru_cache
def _is_known(zone: str) -> bool:
    """Tell whether a time zone has a name of IANA's; Polars opens no other."""
    try:
        zoneinfo.ZoneInfo(zone)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        return False
    return True


def with_features(schema: pa.Schema, metadata: dict[bytes, bytes] | None) -> pa.Schema:
    """Return a file's columns, each with the feature that the metadata of `datasets` gives it."""
    try:
        info = json.loads((metadata or {}).get(FEATURE, b"{}"))
        features = dict(info["info"]["features"])
    except (ValueError, KeyError, TypeError):
        return schema
    return pa.schema(
        [
            f.with_metadata({FEATURE: json.dumps(features[f.name])}) if f.name in features else f
            for f in schema
        ]
    )


def drop_unequal_features(united: pa.Schema, files: Sequence[pa.Schema]) -> pa.Schema:
    """Return the columns of a table without the features that its files do not agree on.

    The number of a class in one file may be another class in the next.
    """
    for index, field in enumerate(united):
        feature = (field.metadata or {}).get(FEATURE)
        if feature is not None:
            alike = [each for schema in files for each in schema if each.name == field.name]
            if any((each.metadata or {}).get(FEATURE) != feature for each in alike):
                united = united.set(index, field.remove_metadata())
    return united

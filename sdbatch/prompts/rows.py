"""Rows of text files and of job files: their columns and sizes, and the Arrow table they become.

A row that cannot be read is a mapping of FAULT to the reason. It stays in the table and fails.
"""

import itertools
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import pyarrow as pa

from sdbatch.errors import PromptTableError, one_line, short_repr
from sdbatch.prompts.file_info import PHOTO_BYTES, check_row_count, check_size
from sdbatch.prompts.sizes import Sizes
from sdbatch.prompts.types import can_unite, json_text_field, to_array, unite_schemas

BATCH_ROWS, BATCH_CHARACTERS = 10_000, 64 * 2**20  # held at once while a file is inspected
MOST_COLUMNS = 2_000
FAULT = "sdbatch: fault"  # column of a table with rows that could not be read: why, or null
Row = dict[str, Any]
Rows = Iterator[tuple[Row, int]]  # each with the number of characters up to its end


def inspect_rows(rows: Rows, where: str, sides: tuple[str, str]) -> tuple[int, pa.Schema, Sizes]:
    """Count `rows`; find their columns and sizes, a few in memory at a time.

    Raises:
        PromptTableError: there are rows, but none can be read.
    """
    count, schema, sizes, faults = 0, pa.schema([]), Sizes(), 0
    fault = ""
    exact: set[str] = set()  # columns with integers that no float is
    height, width = sides
    for batch in _batches(rows):
        good = [row for row in batch if FAULT not in row]
        for row in good:
            sizes.add_row(row.get(height), row.get(width))
        schema = _merge(schema, _infer_schema(good, where, exact))
        if len(good) < len(batch):
            faults += len(batch) - len(good)
            fault = fault or next(row[FAULT] for row in batch if FAULT in row)
        count += len(batch)
        _check_columns(schema.names, where)
    if count and faults == count:
        raise PromptTableError(f"{where} {fault}.")
    return count, pa.schema(_storable(field, exact) for field in schema), sizes


def _storable(field: pa.Field, exact: set[str]) -> pa.Field:
    """Return a column with a type that can store all of its values."""
    if _has_empty_struct(field.type):
        return json_text_field(field.name)
    if pa.types.is_floating(field.type) and field.name in exact:
        return field.with_type(pa.string())
    return field


def _batches(rows: Rows, most: int = BATCH_CHARACTERS) -> Iterator[list[Row]]:
    batch: list[Row] = []
    began = 0
    for row, end in rows:
        batch.append(row)
        if len(batch) == BATCH_ROWS or end - began > most:
            yield batch
            batch, began = [], end
    if batch:
        yield batch


def read_range(rows: Rows, where: str, start: int, stop: int, schema: pa.Schema) -> pa.Table:
    """Return rows [start, stop) with the columns of `schema`; missing ones are null."""
    chosen: list[Row] = []
    began = 0
    for number, (row, end) in enumerate(itertools.islice(rows, stop)):
        if number < start:
            began = end
        else:
            chosen.append(row)
            check_size(where, start, stop, end - began)
    check_row_count(where, start + len(chosen), stop)
    return to_table(chosen, schema, where)


def iter_tables(
    rows: Rows, where: str, schema: pa.Schema, span: tuple[int, int] | None = None
) -> Iterator[pa.Table]:
    """Yield rows with the columns of `schema`, a few in memory at a time.

    `span` [start, stop): only those, and so few at a time that they may be photos.
    """
    some = rows if span is None else itertools.islice(rows, *span)
    most = BATCH_CHARACTERS if span is None else PHOTO_BYTES
    return (to_table(batch, schema, where) for batch in _batches(some, most))


def to_table(rows: list[Row], schema: pa.Schema, where: str) -> pa.Table:
    """Return `rows` with the columns of `schema`, and FAULT if some could not be read.

    Raises:
        PromptTableError: a value does not fit the type of its column.
    """
    columns = []
    for field in schema:
        try:
            columns.append(to_array([row.get(field.name) for row in rows], field))
        except (pa.ArrowException, OverflowError) as error:
            raise PromptTableError(
                f"{where} column {field.name!r} = {one_line(error)}: must be {field.type}, as in "
                f"the rest of the table."
            ) from error
    table = pa.table(columns, schema=schema)
    if any(FAULT in row for row in rows):
        faults = pa.array([row.get(FAULT) for row in rows], pa.string())
        table = table.append_column(FAULT, faults)
    return table


def to_row(value: Any, where: str) -> Row:
    """Return a JSON value as a row; `where` says where it is, such as "line 3"."""
    if isinstance(value, str):
        return {"prompt": value}
    if isinstance(value, dict):
        return value
    return {FAULT: f"{where} = {short_repr(value)}: must be an object or a string"}


def check_surrogates(row: Row, where: str) -> Row:
    """Return a row, or its fault if it holds half a surrogate pair, which no UTF-8 can hold."""
    for name, value in row.items():
        try:
            _texts_of(value).encode()
            name.encode()
        except UnicodeEncodeError:
            name = name.encode("ascii", "backslashreplace").decode()
            return {FAULT: f"{where} column {name!r} = half a surrogate pair: must be text"}
    return row


def _texts_of(value: Any) -> str:
    """Return all texts in a JSON value as one."""
    if isinstance(value, dict):
        return "".join(map(_texts_of, itertools.chain.from_iterable(value.items())))
    if isinstance(value, list):
        return "".join(map(_texts_of, value))
    return value if isinstance(value, str) else ""


def _infer_schema(rows: list[Row], where: str, exact: set[str]) -> pa.Schema:
    names: dict[str, None] = {}
    for row in rows:
        names.update(dict.fromkeys(row))
        _check_columns(names, where)
    fields = []
    for name in names:
        values = [row.get(name) for row in rows]
        fields.append(_infer_field(name, values))
        if pa.types.is_integer(fields[-1].type):
            known = [value for value in values if value is not None]
            if max(max(known), -min(known)) > 2**53:
                exact.add(name)
    return pa.schema(fields)


def _infer_field(name: str, values: list[Any]) -> pa.Field:
    nested = [value for value in values if isinstance(value, dict | list)]
    if nested and _count_keys(nested) > MOST_COLUMNS:
        return json_text_field(name)  # its keys are values, such as ids
    try:
        return pa.field(name, pa.array(values).type)
    except (pa.ArrowException, OverflowError):
        return json_text_field(name) if nested else pa.field(name, pa.string())


def _count_keys(values: Iterable[Any]) -> int:
    """Return how many different keys the objects in `values` have, at most one above the limit."""
    keys: set[str] = set()
    left = [*values]
    while left and len(keys) <= MOST_COLUMNS:
        value = left.pop()
        if isinstance(value, dict):
            keys.update(value)
            left += [each for each in value.values() if isinstance(each, dict | list)]
        else:
            left += [each for each in value if isinstance(each, dict | list)]
    return len(keys)


def _check_columns(names: Collection[str], where: str) -> None:
    if len(names) > MOST_COLUMNS:
        raise PromptTableError(
            f"{where} = more than {MOST_COLUMNS:,} columns: must have fewer. Put them into one "
            f"column of objects."
        )


def _merge(one: pa.Schema, two: pa.Schema) -> pa.Schema:
    """Unite the columns of two parts of a file; a column whose types differ becomes JSON text."""
    try:
        return unite_schemas(one, two)
    except pa.ArrowException:
        conflicts = [
            f.name for f in two if f.name in one.names and not can_unite(one.field(f.name), f)
        ]
        as_text = pa.schema([json_text_field(name) for name in conflicts])
        return unite_schemas(unite_schemas(one, as_text), two)


def _has_empty_struct(arrow_type: pa.DataType) -> bool:
    """Return whether the type contains a struct without fields, which Parquet cannot store."""
    inner = [arrow_type.field(i).type for i in range(arrow_type.num_fields)]
    return (pa.types.is_struct(arrow_type) and not inner) or any(map(_has_empty_struct, inner))

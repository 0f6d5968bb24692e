"""The types of a table's columns: united over its files, settled, and values converted to them.

Text wins over numbers, which are written so that they read back the same; a column without any
value is text.
"""

import json
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

JSON_TEXT = {b"sdbatch": b"json text"}  # metadata of a field whose values are stored as JSON text


def json_text_field(name: str) -> pa.Field:
    """Return the column `name` whose values are stored as JSON text."""
    return pa.field(name, pa.string(), metadata=JSON_TEXT)


def unite_schemas(one: pa.Schema, two: pa.Schema) -> pa.Schema:
    """Unite the columns of two files or parts of one; JSON text in one is JSON text in both.

    Raises:
        pa.ArrowException: a column's types cannot be united.
    """
    names = {field.name for field in (*one, *two) if field.metadata == JSON_TEXT}
    text = {
        name: united
        for name in one.names
        if one.names.count(name) == two.names.count(name) == 1
        and (united := _text_of(one.field(name).type, two.field(name).type)) is not None
    }

    def marked(schema: pa.Schema) -> pa.Schema:
        return pa.schema(
            json_text_field(f.name)
            if f.name in names
            else pa.field(f.name, text.get(f.name, f.type), f.nullable, f.metadata)
            for f in schema
        )

    return pa.unify_schemas([marked(one), marked(two)], promote_options="permissive")


def can_unite(one: pa.Field, two: pa.Field) -> bool:
    """Return whether a column may have both types."""
    try:
        unite_schemas(pa.schema([one]), pa.schema([two]))
    except pa.ArrowException:
        return False
    return True


def _text_of(one: pa.DataType, two: pa.DataType) -> pa.DataType | None:
    """Return the type that both become before they are united; None: each its own."""
    if one.equals(two):
        return None
    if pa.types.is_dictionary(one) or pa.types.is_dictionary(two):
        plain = [t.value_type if pa.types.is_dictionary(t) else t for t in (one, two)]
        if plain[0].equals(plain[1]):
            return plain[0]
        one, two = plain
    if is_text(one) and (_is_number(two) or is_text(two)):
        return one if not pa.types.is_large_string(two) else two
    if is_text(two) and _is_number(one):
        return two
    if {one, two} > {pa.bool_()} and (_is_number(one) and _is_number(two)):
        return pa.string()
    return None


def is_text(arrow_type: pa.DataType) -> bool:
    """Return whether values of the type are text."""
    return bool(pa.types.is_string(arrow_type) or pa.types.is_large_string(arrow_type))


def is_binary(kind: pa.DataType) -> bool:
    """Tell whether a column holds bytes."""
    return bool(
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_fixed_size_binary(kind)
        or pa.types.is_binary_view(kind)
    )


def _is_number(arrow_type: pa.DataType) -> bool:
    return bool(
        pa.types.is_integer(arrow_type)
        or pa.types.is_floating(arrow_type)
        or pa.types.is_boolean(arrow_type)
        or pa.types.is_decimal(arrow_type)
    )


def settled(schema: pa.Schema) -> pa.Schema:
    """Return a schema in which what never had a value is text: null is no type of an output."""
    return pa.schema(
        pa.field(field.name, _settled(field.type), field.nullable, field.metadata)
        for field in schema
    )


def _settled(arrow_type: pa.DataType) -> pa.DataType:
    if pa.types.is_null(arrow_type):
        return pa.string()
    if pa.types.is_list(arrow_type):
        return pa.list_(_settled_field(arrow_type.value_field))
    if pa.types.is_struct(arrow_type):
        return pa.struct([_settled_field(arrow_type.field(i)) for i in range(len(arrow_type))])
    return arrow_type


def _settled_field(field: pa.Field) -> pa.Field:
    return field.with_type(_settled(field.type))


def plain_type(arrow_type: pa.DataType) -> pa.DataType:
    """Return string for string_view and binary for binary_view, which few functions support."""
    if pa.types.is_string_view(arrow_type):
        return pa.string()
    return pa.binary() if pa.types.is_binary_view(arrow_type) else arrow_type


def as_text(value: Any) -> Any:
    """Return a number or a flag as text that reads back the same; other values unchanged."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return repr(value).removesuffix(".0")
    return str(value) if isinstance(value, int) else value


def as_json(value: Any) -> str | None:
    """Return a value as JSON text."""
    return None if value is None else json.dumps(value, ensure_ascii=False, default=str)


def cells_of(rows: pa.Table, name: str) -> list[Any]:
    """Return the values of a column; those of mixed types are stored as JSON text."""
    cells: list[Any] = rows[name].to_pylist()
    if rows.schema.field(name).metadata == JSON_TEXT:
        return [None if cell is None else json.loads(cell) for cell in cells]
    return cells


def to_array(values: list[Any], field: pa.Field) -> pa.Array:
    """Return Python values as a column.

    Raises:
        pa.ArrowException: a value does not fit the type without loss.
    """
    if field.metadata == JSON_TEXT:
        return pa.array([as_json(value) for value in values], pa.string())
    if is_text(field.type):
        values = [as_text(value) for value in values]
        return pa.array(values, field.type)
    found = pa.array(values)  # given a type, pyarrow makes 9 of 9.5
    try:
        return convert(found, field)
    except pa.ArrowNotImplementedError:
        return pa.array(values, field.type)  # such as lists without a value


def convert(values: Any, field: pa.Field) -> Any:
    """Return an array or chunked array as the type of `field`.

    Raises:
        pa.ArrowException: a value does not fit the type without loss.
    """
    if field.metadata == JSON_TEXT:
        return pa.array([as_json(value) for value in values.to_pylist()], pa.string())
    if values.type == field.type:  # a cast breaks slices of nested nulls
        return values
    converted = values.cast(field.type)
    if _may_lose(values.type, field.type):
        back = converted.cast(values.type)
        same = pc.equal(back, values)
        if pa.types.is_floating(values.type):
            same = pc.or_(same, pc.is_nan(values))
        if pc.all(same).as_py() is False:
            raise pa.ArrowInvalid(f"{values.type} that {field.type} cannot hold without loss")
    return converted


def _may_lose(old: pa.DataType, new: pa.DataType) -> bool:
    """Return whether a cast between the types can lose something without an error."""
    if is_text(plain_type(old)):
        return _is_number(new)  # 007 is not 7
    return bool(_is_number(old) and pa.types.is_floating(new))

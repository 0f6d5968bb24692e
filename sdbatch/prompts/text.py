"""A text file of a prompt table: CSV, TSV, JSON, JSONL or TXT, compressed or not.

Each read starts at the file's first byte: fast enough up to some ten million rows; a larger table
belongs in Parquet. In CSV and TSV every column is text; in JSON a column of mixed types is stored
as JSON text.
"""

import csv
import hashlib
import io
import itertools
import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from sdbatch import storage
from sdbatch.errors import PromptTableError
from sdbatch.prompts.file_info import (
    JSON_TEXT,
    FileInfo,
    check_row_count,
    decoding_errors,
    json_text_field,
    unite_schemas,
)

BATCH_ROWS = 10_000  # rows held at once while a file is inspected
Row = dict[str, Any]


def inspect_file(url: str, file_format: str) -> FileInfo:
    """Count the rows of the file at `url` and find its columns, by reading all of it."""
    count, schema = 0, pa.schema([])
    rows = _iter_rows(url, file_format)
    while batch := list(itertools.islice(rows, BATCH_ROWS)):
        schema = _merge(schema, _infer_schema(batch, url))
        count += len(batch)
    fields = [json_text_field(f.name) if _has_empty_struct(f.type) else f for f in schema]
    return FileInfo(count, pa.schema(fields), checksum(url))


def checksum(url: str) -> str:
    """Return the hash of the file's bytes."""
    digest = hashlib.sha256()
    with storage.open_file(url) as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def read_rows(url: str, file_format: str, start: int, stop: int, schema: pa.Schema) -> pa.Table:
    """Return rows [start, stop) with the columns of `schema`; missing ones are null."""
    rows = list(itertools.islice(_iter_rows(url, file_format), start, stop))
    check_row_count(url, start + len(rows), stop)
    return pa.table([_column(rows, field) for field in schema], schema=schema)


def _iter_rows(url: str, file_format: str) -> Iterator[Row]:
    """Yield the rows of a text file, one mapping each."""
    parsers = {
        "csv": _parse_csv,
        "tsv": _parse_tsv,
        "json": _parse_json,
        "jsonl": _parse_jsonl,
        "txt": _parse_txt,
    }
    expected = "a complete file of the format that its suffix names"
    with storage.open_file(url, "infer") as file, decoding_errors(url, expected):
        try:
            with io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
                yield from parsers[file_format](text, url)
        except UnicodeDecodeError as error:
            raise PromptTableError(
                f"{url} line {_undecodable_line(url)} = bytes that are not UTF-8: "
                f"save the file as UTF-8."
            ) from error


def _undecodable_line(url: str) -> int:
    with storage.open_file(url, "infer") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    raise RuntimeError(f"{url} is UTF-8 after all")


def _parse_tsv(text: io.TextIOWrapper, url: str) -> Iterator[Row]:
    # TSV has no quoting (IANA text/tab-separated-values): its quotes are part of the prompt.
    return _parse_csv(text, url, delimiter="\t", quoting=csv.QUOTE_NONE)


def _parse_csv(text: io.TextIOWrapper, url: str, **dialect: Any) -> Iterator[Row]:
    reader = csv.reader(text, strict=True, **dialect)
    try:
        header = next(reader, None)
        if header is None:
            return
        if len(set(header)) != len(header):
            repeated = next(name for name in header if header.count(name) > 1)
            raise PromptTableError(
                f"{url} = column {repeated!r} appears twice: rename one of them."
            )
        for values in reader:
            if not values:
                continue  # a blank line
            if len(values) != len(header):
                raise PromptTableError(
                    f"{url} line {reader.line_num} = {len(values)} fields: must be {len(header)}, "
                    f"as in the header. Quote a field that holds a separator."
                )
            yield dict(zip(header, values, strict=True))
    except csv.Error as error:
        raise PromptTableError(
            f"{url} line {reader.line_num} = {error}: must be valid CSV."
        ) from error


def _parse_json(text: io.TextIOWrapper, url: str) -> Iterator[Row]:
    try:
        values = json.load(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise PromptTableError(f"{url} = {error}: must be valid JSON.") from error
    if not isinstance(values, list):
        raise PromptTableError(
            f"{url} = a JSON {type(values).__name__}: must be a list of objects or of strings."
        )
    for number, value in enumerate(values):
        yield _to_row(value, f"{url} element {number}")


def _parse_jsonl(text: io.TextIOWrapper, url: str) -> Iterator[Row]:
    for number, line in enumerate(text, start=1):
        if line.strip():
            try:
                value = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise PromptTableError(f"{url} line {number} = {error}: must be JSON.") from error
            yield _to_row(value, f"{url} line {number}")


def _to_row(value: Any, where: str) -> Row:
    if isinstance(value, str):
        return {"prompt": value}
    if isinstance(value, dict):
        return value
    raise PromptTableError(f"{where} = {value!r}: must be an object or a string.")


def _parse_txt(text: io.TextIOWrapper, url: str) -> Iterator[Row]:
    for line in text:
        if prompt := line.rstrip("\r\n"):
            yield {"prompt": prompt}


def _infer_schema(rows: list[Row], url: str) -> pa.Schema:
    names = dict.fromkeys(name for row in rows for name in row)
    fields = []
    for name in names:
        try:
            fields.append(pa.field(name, pa.array([row.get(name) for row in rows]).type))
        except UnicodeEncodeError as error:
            raise PromptTableError(
                f"{url} column {name!r} = half a surrogate pair: must be text that UTF-8 can hold."
            ) from error
        except (pa.ArrowException, OverflowError):
            fields.append(json_text_field(name))
    return pa.schema(fields)


def _merge(one: pa.Schema, two: pa.Schema) -> pa.Schema:
    """Unite the columns of two parts of a file; a column whose types differ becomes JSON text."""
    try:
        return unite_schemas(one, two)
    except pa.ArrowException:
        conflicts = [
            f.name for f in two if f.name in one.names and not _can_unite(one.field(f.name), f)
        ]
        as_text = pa.schema([json_text_field(name) for name in conflicts])
        return unite_schemas(unite_schemas(one, as_text), two)


def _can_unite(one: pa.Field, two: pa.Field) -> bool:
    try:
        unite_schemas(pa.schema([one]), pa.schema([two]))
    except pa.ArrowException:
        return False
    return True


def _has_empty_struct(arrow_type: pa.DataType) -> bool:
    """Return whether the type contains a struct without fields, which Parquet cannot store."""
    inner = [arrow_type.field(i).type for i in range(arrow_type.num_fields)]
    return (pa.types.is_struct(arrow_type) and not inner) or any(map(_has_empty_struct, inner))


def _column(rows: list[Row], field: pa.Field) -> pa.Array:
    values = [row.get(field.name) for row in rows]
    if field.metadata == JSON_TEXT:
        values = [None if v is None else json.dumps(v, ensure_ascii=False) for v in values]
    return pa.array(values, field.type)

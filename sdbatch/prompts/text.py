"""A text file of a prompt table: CSV, TSV, JSON, JSONL or TXT, packed or not.

Read from its start each time: fast enough up to some ten million rows, beyond which a table belongs
in Parquet. In CSV and TSV every column is text; in JSON a column that mixes types is kept as its
JSON text.
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
from sdbatch.prompts.contents import MIXED, Contents, check_end, faults, mixed, unite

BATCH = 10_000  # rows held at once while a file is looked through
Row = dict[str, Any]


def look(url: str, kind: str) -> Contents:
    """Count the rows of the file at `url` and find its columns, by reading all of it."""
    count, schema = 0, pa.schema([])
    rows = _rows(url, kind)
    while batch := list(itertools.islice(rows, BATCH)):
        schema = _merge(schema, _infer(batch, url))
        count += len(batch)
    schema = pa.schema([mixed(f.name) if _has_empty_struct(f.type) else f for f in schema])
    return Contents(count, schema, checksum(url))


def checksum(url: str) -> str:
    """Return the hash of the file's bytes."""
    digest = hashlib.sha256()
    with storage.open_file(url) as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def read(url: str, kind: str, start: int, stop: int, schema: pa.Schema) -> pa.Table:
    """Return rows [start, stop) with the columns of `schema`; those it lacks are null."""
    rows = list(itertools.islice(_rows(url, kind), start, stop))
    check_end(url, start + len(rows), stop)
    return pa.table([_column(rows, field) for field in schema], schema=schema)


def _rows(url: str, kind: str) -> Iterator[Row]:
    """Yield the rows of a text file, one mapping each."""
    read = {"csv": _csv, "tsv": _tsv, "json": _json, "jsonl": _jsonl, "txt": _txt}[kind]
    must = "a whole file of the kind its name says"
    with storage.open_file(url, "infer") as file, faults(url, must):
        try:
            with io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
                yield from read(text, url)
        except UnicodeDecodeError as error:
            raise PromptTableError(
                f"{url} line {_bad_line(url)} = bytes that are no UTF-8: save the file as UTF-8."
            ) from error


def _bad_line(url: str) -> int:
    with storage.open_file(url, "infer") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    raise RuntimeError(f"{url} is UTF-8 after all")


def _tsv(text: io.TextIOWrapper, url: str) -> Iterator[Row]:
    # TSV has no quoting (IANA text/tab-separated-values): its quotes are part of the prompt.
    return _csv(text, url, delimiter="\t", quoting=csv.QUOTE_NONE)


def _csv(text: io.TextIOWrapper, url: str, **dialect: Any) -> Iterator[Row]:
    reader = csv.reader(text, strict=True, **dialect)
    try:
        header = next(reader, None)
        if header is None:
            return
        if len(set(header)) != len(header):
            twice = next(name for name in header if header.count(name) > 1)
            raise PromptTableError(f"{url} = column {twice!r} stands twice: rename one of them.")
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


def _json(text: io.TextIOWrapper, url: str) -> Iterator[Row]:
    try:
        values = json.load(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise PromptTableError(f"{url} = {error}: must be valid JSON.") from error
    if not isinstance(values, list):
        raise PromptTableError(
            f"{url} = a JSON {type(values).__name__}: must be a list of objects or of strings."
        )
    for number, value in enumerate(values):
        yield _row(value, f"{url} element {number}")


def _jsonl(text: io.TextIOWrapper, url: str) -> Iterator[Row]:
    for number, line in enumerate(text, start=1):
        if line.strip():
            try:
                value = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise PromptTableError(f"{url} line {number} = {error}: must be JSON.") from error
            yield _row(value, f"{url} line {number}")


def _row(value: Any, where: str) -> Row:
    if isinstance(value, str):
        return {"prompt": value}
    if isinstance(value, dict):
        return value
    raise PromptTableError(f"{where} = {value!r}: must be an object or a string.")


def _txt(text: io.TextIOWrapper, url: str) -> Iterator[Row]:
    for line in text:
        if prompt := line.rstrip("\r\n"):
            yield {"prompt": prompt}


def _infer(rows: list[Row], url: str) -> pa.Schema:
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
            fields.append(mixed(name))
    return pa.schema(fields)


def _merge(one: pa.Schema, two: pa.Schema) -> pa.Schema:
    """Unite the columns of two parts of a file; where their types cannot be, take JSON text."""
    try:
        return unite(one, two)
    except pa.ArrowException:
        clash = [f.name for f in two if f.name in one.names and not _united(one.field(f.name), f)]
        as_text = pa.schema([mixed(name) for name in clash])
        return unite(unite(one, as_text), two)


def _united(one: pa.Field, two: pa.Field) -> bool:
    try:
        unite(pa.schema([one]), pa.schema([two]))
    except pa.ArrowException:
        return False
    return True


def _has_empty_struct(kind: pa.DataType) -> bool:
    """Tell a type that Parquet cannot hold: that of `{}` alone."""
    inner = [kind.field(i).type for i in range(kind.num_fields)]
    return (pa.types.is_struct(kind) and not inner) or any(map(_has_empty_struct, inner))


def _column(rows: list[Row], field: pa.Field) -> pa.Array:
    values = [row.get(field.name) for row in rows]
    if field.metadata == MIXED:
        values = [None if v is None else json.dumps(v, ensure_ascii=False) for v in values]
    return pa.array(values, field.type)

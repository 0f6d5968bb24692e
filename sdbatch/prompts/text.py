"""A text file of a prompt table: CSV, TSV, JSON, JSONL or TXT, compressed or not.

Each read starts at the file's first byte: fast enough up to some ten million rows; a larger table
belongs in Parquet. In CSV and TSV every column is text; in JSON a column of mixed types is stored
as JSON text.
"""

import codecs
import csv
import hashlib
import io
import itertools
import json
from collections.abc import Collection, Iterator
from typing import Any

import pyarrow as pa

from sdbatch import storage
from sdbatch.errors import PromptTableError, short_repr
from sdbatch.prompts.file_info import (
    JSON_TEXT,
    MOST_ROW,
    FileInfo,
    check_row_count,
    check_size,
    decoding_errors,
    json_text_field,
    row_too_long,
    unite_schemas,
)
from sdbatch.prompts.sizes import Sizes

BATCH_ROWS, BATCH_CHARACTERS = 10_000, 64 * 2**20  # held at once while a file is inspected
MOST_JSON = 256 * 2**20  # characters of a JSON file, which is parsed as a whole
MOST_COLUMNS = 2_000
Row = dict[str, Any]
Rows = Iterator[tuple[Row, int]]  # each with the number of characters up to its end


def inspect_file(url: str, file_format: str, sides: tuple[str, str]) -> FileInfo:
    """Count the rows of the file at `url` and find columns and sizes, by reading all of it."""
    count, schema, sizes = inspect_rows(_iter_rows(url, file_format), url, sides)
    return FileInfo(count, schema, checksum(url), sizes)


def inspect_rows(rows: Rows, where: str, sides: tuple[str, str]) -> tuple[int, pa.Schema, Sizes]:
    """Count `rows`; find their columns and sizes, a few in memory at a time."""
    count, schema, sizes = 0, pa.schema([]), Sizes()
    height, width = sides
    for batch in _batches(rows):
        for row in batch:
            sizes.add_row(row.get(height), row.get(width))
        schema = _merge(schema, _infer_schema(batch, where))
        count += len(batch)
        _check_columns(schema.names, where)
    fields = [json_text_field(f.name) if _has_empty_struct(f.type) else f for f in schema]
    return count, pa.schema(fields), sizes


def _batches(rows: Rows) -> Iterator[list[Row]]:
    batch: list[Row] = []
    began = 0
    for row, end in rows:
        batch.append(row)
        if len(batch) == BATCH_ROWS or end - began > BATCH_CHARACTERS:
            yield batch
            batch, began = [], end
    if batch:
        yield batch


def checksum(url: str) -> str:
    """Return the hash of the file's bytes."""
    digest = hashlib.sha256()
    with storage.open_file(url) as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def read_rows(url: str, file_format: str, start: int, stop: int, schema: pa.Schema) -> pa.Table:
    """Return rows [start, stop) with the columns of `schema`; missing ones are null."""
    rows: list[Row] = []
    began = 0
    for number, (row, end) in enumerate(itertools.islice(_iter_rows(url, file_format), stop)):
        if number < start:
            began = end
        else:
            rows.append(row)
            check_size(url, start, stop, end - began)
    check_row_count(url, start + len(rows), stop)
    return to_table(rows, schema)


def to_table(rows: list[Row], schema: pa.Schema) -> pa.Table:
    """Return `rows` as a table with the columns of `schema`; missing values are null."""
    return pa.table([_column(rows, field) for field in schema], schema=schema)


class _Text:
    """The text of a file, in lines of which none is longer than a row may be."""

    def __init__(self, text: io.TextIOWrapper, url: str) -> None:
        self.url = url
        self.characters = 0  # read so far
        self._text = text

    def __iter__(self) -> Iterator[str]:
        number = 0
        while line := self._text.readline(MOST_ROW + 1):
            number += 1
            self.characters += len(line)
            if len(line) > MOST_ROW:
                raise row_too_long(f"{self.url} line {number}")
            yield line

    def read(self) -> str:
        """Return all of the text, which may have MOST_JSON characters."""
        text = self._text.read(MOST_JSON + 1)
        if len(text) > MOST_JSON:
            raise PromptTableError(
                f"{self.url} = more than {MOST_JSON // 2**20} MiB of JSON: must be smaller, as it "
                f"is in memory as a whole. Use JSONL, an object per line."
            )
        return text


def _iter_rows(url: str, file_format: str) -> Rows:
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
            with io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as opened:
                text = _Text(opened, url)
                for row in parsers[file_format](text):
                    yield row, text.characters
        except UnicodeDecodeError as error:
            raise PromptTableError(
                f"{url} line {_undecodable_line(url)} = bytes that are not UTF-8: "
                f"save the file as UTF-8."
            ) from error


def _undecodable_line(url: str) -> int:
    decoder = codecs.getincrementaldecoder("utf-8")()
    number = 1
    with storage.open_file(url, "infer") as file:
        while chunk := file.read(1 << 20):
            try:
                decoder.decode(chunk)
            except UnicodeDecodeError as error:
                return number + error.object[: error.start].count(b"\n")
            number += chunk.count(b"\n")
    return number  # the last character is not complete


def _parse_tsv(text: _Text) -> Iterator[Row]:
    # TSV has no quoting (IANA text/tab-separated-values): its quotes are part of the prompt.
    return _parse_csv(text, delimiter="\t", quoting=csv.QUOTE_NONE)


def _parse_csv(text: _Text, **dialect: Any) -> Iterator[Row]:
    url, reader = text.url, csv.reader(text, strict=True, **dialect)
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
            f"{url} line {reader.line_num} = {error}: must be valid CSV, with at most "
            f"{csv.field_size_limit():,} characters in a field. Use JSONL for longer text."
        ) from error


def _parse_json(text: _Text) -> Iterator[Row]:
    url = text.url
    try:
        values = json.loads(text.read())
    except (json.JSONDecodeError, RecursionError) as error:
        raise PromptTableError(f"{url} = {error}: must be valid JSON.") from error
    if not isinstance(values, list):
        raise PromptTableError(
            f"{url} = a JSON {type(values).__name__}: must be a list of objects or of strings."
        )
    for number, value in enumerate(values):
        yield _to_row(value, f"{url} element {number}")


def _parse_jsonl(text: _Text) -> Iterator[Row]:
    url = text.url
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
    raise PromptTableError(f"{where} = {short_repr(value)}: must be an object or a string.")


def _parse_txt(text: _Text) -> Iterator[Row]:
    for line in text:
        if prompt := line.rstrip("\r\n"):
            yield {"prompt": prompt}


def _infer_schema(rows: list[Row], url: str) -> pa.Schema:
    names = dict.fromkeys(name for row in rows for name in row)
    _check_columns(names, url)
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

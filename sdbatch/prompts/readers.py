"""The rows of one file of a prompt table, in any of the formats.

Parquet is typed and read by row group. The text formats are read from their start each time:
fast enough up to some ten million rows, beyond which a table belongs in Parquet. In CSV and TSV
every column is text; in JSON a column that mixes types is kept as its JSON text.
"""

import contextlib
import csv
import hashlib
import io
import itertools
import json
import lzma
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sdbatch import storage
from sdbatch.errors import PromptTableError

KINDS = ("parquet", "csv", "tsv", "json", "jsonl", "txt")
BATCH = 10_000  # rows held at once while a text file is looked through
MIXED = {b"sdbatch": b"json text"}  # metadata of a field whose values are kept as JSON text
Row = dict[str, Any]


@dataclass(frozen=True)
class Contents:
    """What is in a file: found without its prompts for Parquet, by one pass for the others."""

    rows: int
    schema: pa.Schema
    checksum: str  # Parquet: of size and footer; others: of all bytes


def kind(path: str) -> str | None:
    """Return the format that the name of `path` says, None if it is none of KINDS."""
    name = path.rsplit("/", 1)[-1].lower()
    for compressed in (".gz", ".bz2", ".xz"):
        if name.endswith(compressed) and not name.endswith(f".parquet{compressed}"):
            name = name.removesuffix(compressed)
    suffix = {"pq": "parquet", "ndjson": "jsonl"}.get(
        name.rpartition(".")[2], name.rpartition(".")[2]
    )
    return suffix if suffix in KINDS else None


def look(url: str) -> Contents:
    """Count the rows of the file at `url` and find its columns."""
    if kind(url) == "parquet":
        return _look_parquet(url)
    count, schema = 0, pa.schema([])
    rows = _rows(url)
    while batch := list(itertools.islice(rows, BATCH)):
        schema = _merge(schema, _infer(batch, url))
        count += len(batch)
    return Contents(count, schema, _sha256(url))


def read(url: str, start: int, stop: int, schema: pa.Schema) -> pa.Table:
    """Return rows [start, stop) of the file at `url` with the columns of `schema`."""
    if kind(url) == "parquet":
        return _read_parquet(url, start, stop, schema)
    rows = list(itertools.islice(_rows(url), start, stop))
    _check_end(url, start + len(rows), stop)
    return pa.table([_column(rows, field) for field in schema], schema=schema)


def unite(one: pa.Schema, two: pa.Schema) -> pa.Schema:
    """Unite the columns of two files or parts of one; JSON text in one is JSON text in both.

    Raises:
        pa.ArrowException: a column's types cannot be united.
    """
    mixed = {field.name for field in (*one, *two) if field.metadata == MIXED}

    def marked(schema: pa.Schema) -> pa.Schema:
        return pa.schema([_mixed(f.name) if f.name in mixed else f for f in schema])

    return pa.unify_schemas([marked(one), marked(two)], promote_options="permissive")


@contextlib.contextmanager
def _faults(url: str, must: str) -> Iterator[None]:
    """Tell a broken file from a store out of reach: what a decoder raises has no errno."""
    try:
        yield
    except (pa.ArrowException, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise PromptTableError(f"{url} = {_line(error)}: must be {must}.") from error


def _look_parquet(url: str) -> Contents:
    with storage.open_file(url) as file, _faults(url, "a Parquet file"):
        metadata = pq.read_metadata(file)
        schema = metadata.schema.to_arrow_schema().remove_metadata()
        size = file.seek(0, io.SEEK_END)
        file.seek(-(metadata.serialized_size + 8), io.SEEK_END)
        checksum = hashlib.sha256(f"{size} ".encode() + file.read()).hexdigest()
    schema = pa.schema([field.remove_metadata() for field in schema])
    return Contents(metadata.num_rows, schema, checksum)


def _read_parquet(url: str, start: int, stop: int, schema: pa.Schema) -> pa.Table:
    with storage.open_file(url) as file, _faults(url, "a Parquet file"):
        parquet = pq.ParquetFile(file)
        _check_end(url, parquet.metadata.num_rows, stop)
        columns = [name for name in schema.names if name in parquet.schema_arrow.names]
        table = pa.concat_tables(_slices(parquet, start, stop, columns))
    arrays = []
    for field in schema:
        with _faults(f"{url} column {field.name!r}", f"{field.type}, as the other files say"):
            arrays.append(
                table[field.name].cast(field.type)
                if field.name in columns
                else pa.nulls(stop - start, field.type)
            )
    return pa.table(arrays, schema=schema)


def _check_end(url: str, rows: int, stop: int) -> None:
    if rows < stop:
        raise PromptTableError(
            f"{url} = {rows} rows: had {stop} at least, and must not change while read."
        )


def _slices(
    parquet: pq.ParquetFile, start: int, stop: int, columns: list[str]
) -> Iterator[pa.Table]:
    """Yield rows [start, stop) piece by piece; a row group is never decoded whole."""
    first = 0
    for group in range(parquet.num_row_groups):
        last = first + parquet.metadata.row_group(group).num_rows
        if first < stop and last > start:
            at = first
            for batch in parquet.iter_batches(BATCH, row_groups=[group], columns=columns):
                low, high = max(start - at, 0), min(stop - at, batch.num_rows)
                if low < high:
                    yield pa.Table.from_batches([batch.slice(low, high - low)])
                at += batch.num_rows
                if at >= stop:
                    return
        first = last


def _rows(url: str) -> Iterator[Row]:
    """Yield the rows of a text file, one mapping each."""
    read = {"csv": _csv, "tsv": _csv, "json": _json, "jsonl": _jsonl, "txt": _txt}[kind(url) or ""]
    must = "a whole file of the kind its name says"
    with storage.open_file(url, "infer") as file, _faults(url, must):
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


def _csv(text: io.TextIOWrapper, url: str) -> Iterator[Row]:
    # TSV has no quoting (IANA text/tab-separated-values): its quotes are part of the prompt.
    dialect: dict[str, Any] = (
        {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if kind(url) == "tsv" else {}
    )
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
            fields.append(_mixed(name))
    return pa.schema(fields)


def _merge(one: pa.Schema, two: pa.Schema) -> pa.Schema:
    """Unite the columns of two parts of a file; where their types cannot be, take JSON text."""
    try:
        return unite(one, two)
    except pa.ArrowException:
        clash = [f.name for f in two if f.name in one.names and not _united(one.field(f.name), f)]
        mixed = pa.schema([_mixed(name) for name in clash])
        return unite(unite(one, mixed), two)


def _united(one: pa.Field, two: pa.Field) -> bool:
    try:
        unite(pa.schema([one]), pa.schema([two]))
    except pa.ArrowException:
        return False
    return True


def _mixed(name: str) -> pa.Field:
    return pa.field(name, pa.string(), metadata=MIXED)


def _column(rows: list[Row], field: pa.Field) -> pa.Array:
    values = [row.get(field.name) for row in rows]
    if field.metadata == MIXED:
        values = [None if v is None else json.dumps(v, ensure_ascii=False) for v in values]
    return pa.array(values, field.type)


def _sha256(url: str) -> str:
    digest = hashlib.sha256()
    with storage.open_file(url) as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _line(error: Exception) -> str:
    return " ".join(str(error).split())

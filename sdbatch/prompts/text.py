"""A text file of a prompt table: CSV, TSV, JSON, JSONL or TXT, compressed or not.

Each read starts at the file's first byte: fast enough up to some ten million rows; a larger table
belongs in Parquet. In CSV and TSV every column is text, and an empty cell is null.
"""

import bz2
import codecs
import contextlib
import gzip
import hashlib
import io
import lzma
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import IO, Any

import pyarrow as pa

from sdbatch import storage
from sdbatch.errors import PromptTableError
from sdbatch.job import Reader
from sdbatch.prompts import formats, lines, objects, rows, separated
from sdbatch.prompts.file_info import MOST_ROW, FileInfo, decoding_errors, row_too_long
from sdbatch.prompts.formats import Kind
from sdbatch.prompts.rows import Row, Rows

MOST_JSON = 256 * 2**20  # characters of a JSON file, which is parsed as a whole
_LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")


def inspect_file(url: str, kind: Kind, reader: Reader, sides: tuple[str, str]) -> FileInfo:
    """Count the rows of the file at `url` and find columns and sizes, by reading all of it."""
    with _open_rows(url, kind, reader) as (file_format, found):
        count, schema, sizes = rows.inspect_rows(found, url, sides)
    if file_format in ("csv", "tsv"):
        schema = pa.schema([pa.field(name, pa.string()) for name in schema.names])
    return FileInfo(count, schema, checksum(url), sizes, file_format)


def checksum(url: str) -> str:
    """Return the hash of the file's bytes."""
    digest = hashlib.sha256()
    with storage.open_file(url) as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def read_rows(
    url: str, kind: Kind, reader: Reader, span: tuple[int, int], schema: pa.Schema
) -> pa.Table:
    """Return the rows of a span [start, stop) with the columns of `schema`; missing ones: null."""
    with _open_rows(url, kind, reader) as (_, found):
        return rows.read_range(found, url, *span, schema)


def iter_tables(
    url: str,
    kind: Kind,
    reader: Reader,
    schema: pa.Schema,
    span: tuple[int, int] | None = None,
) -> Iterator[pa.Table]:
    """Yield all rows, or those of a span, with the columns of `schema`, a few at a time."""
    with _open_rows(url, kind, reader) as (_, found):
        yield from rows.iter_tables(found, url, schema, span)


class Text:
    """The text of a file, in lines of which none is longer than a row may be."""

    def __init__(
        self, text: io.TextIOWrapper, url: str, reopened: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        self.url = url
        self.reopened = reopened  # as another Text, to look through the file before it is read
        self.characters = 0  # read so far
        self._text = text
        head = text.read(formats.HEAD)
        head += text.readline(MOST_ROW + 1)
        if len(head) <= MOST_ROW and "\n" not in head.strip():
            head += text.readline(MOST_ROW + 1)
        self.head = head  # whole lines, more than one if there are

    def __iter__(self) -> Iterator[str]:
        for number, line in enumerate(self._lines(), start=1):
            self.characters += len(line)
            if len(line) > MOST_ROW:
                raise row_too_long(f"{self.url} line {number}")
            yield line

    def _lines(self) -> Iterator[str]:
        for match in _LINE.finditer(self.head):
            yield match[0]
        while line := self._text.readline(MOST_ROW + 1):
            yield line

    def read(self) -> str:
        """Return all of the text, which may have MOST_JSON characters."""
        text = self.head + self._text.read(MOST_JSON + 1)
        if len(text) > MOST_JSON:
            raise PromptTableError(
                f"{self.url} = more than {MOST_JSON // 2**20} MiB of JSON: must be smaller, as it "
                f"is in memory as a whole. Use JSONL, an object per line."
            )
        return text


@contextlib.contextmanager
def _open_rows(url: str, kind: Kind, reader: Reader) -> Iterator[tuple[str, Rows]]:
    """Open a file; yield the format of its content, and its rows, one mapping each."""
    parsers: dict[str, Callable[[Text, Reader], Iterator[Row]]] = {
        "csv": separated.parse_csv,
        "tsv": separated.parse_tsv,
        "json": objects.parse_document,
        "jsonl": objects.parse_lines,
        "txt": lines.parse_lines,
    }
    with _open_text(url, kind, reader) as text:
        file_format = kind.format
        if not kind.certain:
            file_format = formats.format_of_text(kind.format, text.head)
        if (wrong := formats.describe_text(text.head)) is not None:
            raise PromptTableError(f"{url} = {wrong}")
        parsed = parsers[file_format](text, reader)
        yield file_format, ((row, text.characters) for row in parsed)


@contextlib.contextmanager
def _open_text(url: str, kind: Kind, reader: Reader) -> Iterator[Text]:
    expected = f"a complete file of {kind.format.upper()}, as its name or the job says"
    with storage.open_file(url) as file, decoding_errors(url, expected):
        try:
            stream = io.BufferedReader(_decompressed(file, kind.compression), formats.HEAD)
            _check_bytes(stream, url, reader)
            encoding = "utf-8-sig" if _is_utf8(reader) else reader.encoding
            with io.TextIOWrapper(stream, encoding=encoding, newline="") as opened:
                yield Text(opened, url, lambda: _open_text(url, kind, reader))
        except UnicodeError as error:
            raise PromptTableError(
                f"{url} line {_undecodable_line(url, kind, reader)} = bytes that are not "
                f"{reader.encoding.upper()}: save the file as UTF-8, or name its encoding: "
                f"--set prompts.reader.encoding=cp1252"
            ) from error


def _decompressed(file: IO[bytes], compression: str | None) -> Any:
    if compression is None:
        return file
    if compression == "zstd":
        return pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd")
    return {"gzip": gzip.open, "bz2": bz2.open, "xz": lzma.open}[compression](file)  # type: ignore


def _check_bytes(stream: io.BufferedReader, url: str, reader: Reader) -> None:
    """Raise a PromptTableError if the first bytes are not those of text."""
    head = stream.peek(formats.HEAD)
    if head and _is_utf8(reader) and (wrong := formats.describe_bytes(head[: formats.HEAD])):
        raise PromptTableError(f"{url} = {wrong}")


def _is_utf8(reader: Reader) -> bool:
    return codecs.lookup(reader.encoding).name == "utf-8"


def _undecodable_line(url: str, kind: Kind, reader: Reader) -> int:
    decoder = codecs.getincrementaldecoder(reader.encoding)()
    number = 1
    with storage.open_file(url) as file:
        stream = _decompressed(file, kind.compression)
        while chunk := stream.read(1 << 20):
            try:
                number += decoder.decode(chunk).count("\n")
            except UnicodeError as error:
                start = getattr(error, "start", 0)
                return number + int(chunk[:start].count(b"\n"))
    return number  # the last character is not complete

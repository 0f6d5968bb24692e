"""An Arrow file or stream of a prompt table: Feather, IPC, what Hugging Face's save_to_disk writes.

Rows are counted from the heads of its messages, which also say how large a batch will be. A stream
is read from its start for every shard, as text is.
"""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, NamedTuple

import pyarrow as pa

from sdbatch import storage
from sdbatch.errors import PromptTableError
from sdbatch.prompts.extras import with_features
from sdbatch.prompts.file_info import (
    MOST_ROWS,
    FileInfo,
    check_row_count,
    check_size,
    decoding_errors,
)
from sdbatch.prompts.fit import check_values, fit
from sdbatch.prompts.sizes import Sizes
from sdbatch.prompts.text import checksum
from sdbatch.prompts.types import plain_type

_FILE = b"ARROW1"
_EXPECTED = "a complete Arrow file or stream"
_DICTIONARY, _BATCH = 2, 3  # kinds of messages


class _Message(NamedTuple):
    kind: int
    rows: int
    unpacked: int  # bytes that its compressed buffers become


def inspect_file(url: str, sides: tuple[str, str]) -> FileInfo:
    """Count the rows of the file at `url` and find columns and sizes."""
    sizes = Sizes()
    with storage.open_file(url) as file, _arrow_errors(url):
        rows = sum(_batch_rows(file, url))
        schema = _open(file, None).schema
        present = [name for name in sides if name in schema.names]
        for batch in _read_batches(file, present) if present else ():
            nulls = [None] * batch.num_rows
            cells = [batch[name].to_pylist() if name in present else nulls for name in sides]
            for height, width in zip(*cells, strict=True):
                sizes.add_row(height, width)
    if not present and rows:
        sizes.add((None, None))
    fields = pa.schema([pa.field(field.name, plain_type(field.type)) for field in schema])
    return FileInfo(rows, with_features(fields, schema.metadata), checksum(url), sizes, "arrow")


def read_rows(url: str, start: int, stop: int, schema: pa.Schema) -> pa.Table:
    """Return rows [start, stop) with the columns of `schema`; missing ones are null."""
    batches, size, first = [], 0, 0
    with storage.open_file(url) as file, _arrow_errors(url):
        counts = _batch_rows(file, url)
        check_row_count(url, sum(counts), stop)
        names = _open(file, None).schema.names
        columns = [name for name in schema.names if name in names]
        skipped = 0
        while first + counts[skipped] <= start < stop:
            first += counts[skipped]
            skipped += 1
        for batch in _read_batches(file, columns, skipped):
            low, high = max(start - first, 0), min(stop - first, batch.num_rows)
            first += batch.num_rows
            if low < high:
                part = batch.slice(low, high - low)
                part.validate()
                size += check_values(part, first - batch.num_rows + low, url)
                check_size(url, start, stop, size)
                batches.append(part)
            if first >= stop:
                break
    check_row_count(url, start + sum(batch.num_rows for batch in batches), stop)
    return fit(batches, schema, start, url)


def iter_tables(url: str, schema: pa.Schema) -> Iterator[pa.Table]:
    """Yield all rows of a file with the columns of `schema`, a batch in memory at a time."""
    start = 0
    with storage.open_file(url) as file, _arrow_errors(url):
        _batch_rows(file, url)  # raises where a batch is too large
        names = _open(file, None).schema.names
        columns = [name for name in schema.names if name in names]
        for batch in _read_batches(file, columns):
            batch.validate()
            check_values(batch, start, url)
            yield fit([batch], schema, start, url)
            start += batch.num_rows


def iter_rows(url: str, span: tuple[int, int], schema: pa.Schema) -> Iterator[pa.Table]:
    """Yield rows [start, stop) with the columns of `schema`, a batch in memory at a time.

    A local file is mapped into memory: of its batches only the rows that are used are read.
    """
    start, stop = span
    with storage.open_file(url) as file, _arrow_errors(url):
        counts = _batch_rows(file, url)
        names = _open(file, None).schema.names
        columns = [name for name in schema.names if name in names]
        opened = pa.memory_map(storage.connect(url)[1]) if storage.is_local(url) else file
        first = 0
        for rows, batch in zip(counts, _read_batches(opened, columns), strict=True):
            low, high = max(start - first, 0), min(stop - first, rows)
            if low < high:
                yield fit([batch.slice(low, high - low)], schema, first + low, url)
            first += rows
            if first >= stop:
                return


@contextmanager
def _arrow_errors(url: str) -> Iterator[None]:
    with decoding_errors(url, _EXPECTED):
        try:
            yield
        except (struct.error, IndexError, KeyError) as error:
            raise pa.ArrowInvalid(f"a damaged message ({error})") from error


def _open(file: IO[bytes], columns: list[str] | None) -> pa.ipc.RecordBatchStreamReader:
    """Open a file or stream for all columns or for some of them."""
    file.seek(0)
    is_file = file.read(len(_FILE)) == _FILE
    file.seek(0)
    opener = pa.ipc.open_file if is_file else pa.ipc.open_stream
    options = pa.ipc.IpcReadOptions()
    if columns is not None:
        names = opener(_native(file)).schema.names
        file.seek(0)
        chosen = [number for number, name in enumerate(names) if name in columns]
        options.included_fields = chosen or [0]  # an empty list would be all of them
    return opener(_native(file), options=options)


def _native(file: Any) -> pa.NativeFile:
    return file if isinstance(file, pa.NativeFile) else pa.PythonFile(file, mode="r")


def _read_batches(
    file: IO[bytes], columns: list[str], skipped: int = 0
) -> Iterator[pa.RecordBatch]:
    """Yield the batches of a file or stream, without the first `skipped`."""
    reader = _open(file, columns)
    if isinstance(reader, pa.ipc.RecordBatchFileReader):
        for number in range(skipped, reader.num_record_batches):
            yield reader.get_batch(number)
        return
    for number, batch in enumerate(reader):
        if number >= skipped:
            yield batch


def _batch_rows(file: IO[bytes], url: str) -> list[int]:
    """Return the number of rows in each batch.

    Raises:
        PromptTableError: a batch would need too much memory.
    """
    counts = []
    for message in _messages(file):
        if message.unpacked > MOST_ROWS:
            raise PromptTableError(
                f"{url} = a batch of {message.unpacked / 2**20:,.0f} MiB: must have at most "
                f"{MOST_ROWS // 2**20} MiB, as it is in memory. Write smaller batches, or Parquet."
            )
        if message.kind == _BATCH:
            counts.append(message.rows)
    return counts


def _messages(file: IO[bytes]) -> Iterator[_Message]:
    """Yield the messages with data, without their data. A file is a stream after 8 bytes.

    https://arrow.apache.org/docs/format/Columnar.html#encapsulated-message-format, and the
    flatbuffers Message.fbs and Schema.fbs there.
    """
    file.seek(0)
    place = 8 if file.read(len(_FILE)) == _FILE else 0
    while True:
        file.seek(place)
        prefix = file.read(8)
        if len(prefix) < 8:
            return
        mark, size = struct.unpack("<iI", prefix)
        start = place + 8
        if mark != -1:  # before Arrow 0.15
            size, start = mark, place + 4
        if size <= 0:
            return
        file.seek(start)
        message = _Flatbuffer(file.read(size))
        kind = message.number("<B", message.root, 1)
        body = message.number("<q", message.root, 3)
        if kind in (_DICTIONARY, _BATCH):
            batch = message.table(message.root, 2)
            if kind == _DICTIONARY:
                batch = message.table(batch, 1)
            rows = message.number("<q", batch, 0)
            yield _Message(kind, rows, _unpacked(file, message, batch, start + size))
        if body < 0:
            raise struct.error("a negative length")
        place = start + size + body


def _unpacked(file: IO[bytes], message: "_Flatbuffer", batch: int, body: int) -> int:
    """Return the bytes of a batch's compressed buffers once unpacked, each of which begins so."""
    if not message.field(batch, 3):
        return 0
    total = 0
    for offset, length in message.buffers(batch, 2):
        if length >= 8:
            file.seek(body + offset)
            (size,) = struct.unpack("<q", file.read(8))
            total += length if size == -1 else size
    return total


class _Flatbuffer:
    """The few things that are needed of https://flatbuffers.dev/internals."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.root = self._read("<I", 0)

    def _read(self, kind: str, place: int) -> int:
        if place < 0:
            raise struct.error("a negative place")
        value: int = struct.unpack_from(kind, self._data, place)[0]
        return value

    def field(self, table: int, number: int) -> int:
        """Return the place of a table's field; 0: it has none."""
        entries = table - self._read("<i", table)
        if 4 + 2 * number >= self._read("<H", entries):
            return 0
        offset = self._read("<H", entries + 4 + 2 * number)
        return table + offset if offset else 0

    def number(self, kind: str, table: int, number: int) -> int:
        """Return a field that is a number."""
        place = self.field(table, number)
        return self._read(kind, place) if place else 0

    def table(self, table: int, number: int) -> int:
        """Return the place of a field that is a table."""
        place = self.field(table, number)
        return place + self._read("<I", place)

    def buffers(self, table: int, number: int) -> Iterator[tuple[int, int]]:
        """Yield offset and length of each buffer in a field that is a list of them."""
        place = self.field(table, number)
        if place:
            place += self._read("<I", place)
            for each in range(self._read("<I", place)):
                yield struct.unpack_from("<qq", self._data, place + 4 + 16 * each)

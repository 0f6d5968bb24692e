"""A prompt table whose rows are in the job file itself: read like the lines of a JSONL file.

The rows travel with the job. Nothing else holds a copy, so that memory grows with the rows and not
with the rows times the shards.
"""

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa

from sdbatch.prompts import rows as row_reader
from sdbatch.prompts.file_info import FileInfo

NAME = "rows.jsonl"  # of its only source
WHERE = "prompts.rows"  # as errors call it
Rows = list[dict[str, Any]]


def inspect_rows(rows: Rows, sides: tuple[str, str]) -> FileInfo:
    """Find the columns of `rows` and the largest sizes of their images, and hash them."""
    digest = hashlib.sha256()
    for line in _lines(rows):
        digest.update(line.encode())
    plain = ((row, 0) for row in _plain(rows))
    count, schema, sizes = row_reader.inspect_rows(plain, WHERE, sides)
    return FileInfo(count, schema, digest.hexdigest(), sizes, "jsonl")


def read_rows(rows: Rows, start: int, stop: int, schema: pa.Schema) -> pa.Table:
    """Return rows [start, stop) with the columns of `schema`; missing ones are null."""
    plain = _plain(itertools.islice(rows, start, stop), start)
    return row_reader.to_table(list(plain), schema, WHERE)


def _lines(rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    return (f"{json.dumps(row, default=str)}\n" for row in rows)


def _plain(rows: Iterable[dict[str, Any]], start: int = 0) -> Iterator[dict[str, Any]]:
    """Yield rows with the types of JSON: a date of YAML becomes text."""
    for number, line in enumerate(_lines(rows), start):
        yield row_reader.check_surrogates(json.loads(line), f"row {number}")

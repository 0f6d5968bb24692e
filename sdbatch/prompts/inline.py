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

from sdbatch.prompts import text
from sdbatch.prompts.file_info import FileInfo

NAME = "rows.jsonl"  # of its only source
WHERE = "prompts.rows"  # as errors call it
Rows = list[dict[str, Any]]


def inspect_rows(rows: Rows, sides: tuple[str, str]) -> FileInfo:
    """Find the columns of `rows` and the largest sizes of their images, and hash them."""
    digest = hashlib.sha256()
    for line in _lines(rows):
        digest.update(line.encode())
    count, schema, sizes = text.inspect_rows(((row, 0) for row in _plain(rows)), WHERE, sides)
    return FileInfo(count, schema, digest.hexdigest(), sizes)


def read_rows(rows: Rows, start: int, stop: int, schema: pa.Schema) -> pa.Table:
    """Return rows [start, stop) with the columns of `schema`; missing ones are null."""
    return text.to_table(list(_plain(itertools.islice(rows, start, stop))), schema)


def _lines(rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    return (f"{json.dumps(row, default=str)}\n" for row in rows)


def _plain(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield rows with the types of JSON: a date of YAML becomes text."""
    return map(json.loads, _lines(rows))

"""The rows of one file of a prompt table, whatever its format."""

import base64
import json
from typing import Any

import pyarrow as pa

from sdbatch.prompts import parquet, text
from sdbatch.prompts.contents import Contents

_INLINE = "data:application/jsonl;base64,"  # a URL that fsspec reads as any other
KINDS = ("parquet", "csv", "tsv", "json", "jsonl", "txt")


def kind(path: str) -> str | None:
    """Return the format that the name of `path` says, None if it is none of KINDS."""
    if path.startswith(_INLINE):
        return "jsonl"
    name = path.rsplit("/", 1)[-1].lower()
    for compressed in (".gz", ".bz2", ".xz"):
        if name.endswith(compressed) and not name.endswith(f".parquet{compressed}"):
            name = name.removesuffix(compressed)
    suffix = {"pq": "parquet", "ndjson": "jsonl"}.get(
        name.rpartition(".")[2], name.rpartition(".")[2]
    )
    return suffix if suffix in KINDS else None


def inline(rows: list[dict[str, Any]]) -> str:
    """Return a URL that holds `rows` itself, for a table that is no file."""
    lines = "".join(f"{json.dumps(row, default=str)}\n" for row in rows)
    return _INLINE + base64.b64encode(lines.encode()).decode()


def look(url: str) -> Contents:
    """Count the rows of the file at `url` and find its columns; no row of Parquet is read."""
    return parquet.look(url) if kind(url) == "parquet" else text.look(url, str(kind(url)))


def checksum(url: str) -> str:
    """Return what stands for the file's contents: a hash of Parquet's footer, or of all bytes."""
    return parquet.checksum(url) if kind(url) == "parquet" else text.checksum(url)


def read(url: str, start: int, stop: int, schema: pa.Schema) -> pa.Table:
    """Return rows [start, stop) of the file at `url` with the columns of `schema`."""
    if kind(url) == "parquet":
        return parquet.read(url, start, stop, schema)
    return text.read(url, str(kind(url)), start, stop, schema)

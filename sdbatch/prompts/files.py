"""The files of a prompt table: find them; inspect or read one, whatever its format."""

import base64
import json
import posixpath
import re
from typing import Any

import pyarrow as pa

from sdbatch import storage
from sdbatch.errors import PromptTableError
from sdbatch.prompts import parquet, text
from sdbatch.prompts.file_info import FileInfo

_INLINE = "data:application/jsonl;base64,"  # a URL that fsspec reads like any other
FORMATS = ("parquet", "csv", "tsv", "json", "jsonl", "txt")


def find_files(paths: list[str]) -> dict[str, str]:
    """Return the table's files, name -> URL, sorted by name within each path."""
    files: dict[str, str] = {}
    urls: set[str] = set()
    if not paths:
        raise PromptTableError("prompts.path = []: must name at least one file.")
    for path in paths:
        for name, url in sorted(_expand(path).items()):
            if url in urls:
                raise PromptTableError(f"prompts.path = {url} appears twice: list each file once.")
            urls.add(url)
            files[name if name not in files else url] = url
    return files


def _expand(path: str) -> dict[str, str]:
    """Return the files of one file, folder or glob, name -> URL."""
    fs, root = storage.connect(path)
    with storage.storage_errors(path):
        if fs.isdir(root):
            base, files = root, [name for name in fs.find(root) if _is_table(name[len(root) :])]
        elif fs.exists(root):
            base, files = posixpath.dirname(root), [root]
        else:
            base = posixpath.dirname(re.split(r"[*?\[]", root)[0] + "x")
            files = [name for name in fs.glob(root) if not fs.isdir(name)]
    if not files:
        raise PromptTableError(
            f"prompts.path = {path}: no such file, or no table in the folder. Check the path."
        )
    for name in files:
        if format_of(name) is None:
            raise PromptTableError(
                f"prompts.path = {name}: must be one of {', '.join(FORMATS)}, by its suffix."
            )
    local = storage.is_local(path)
    return {
        name[len(base) :].lstrip("/"): name if local else fs.unstrip_protocol(name)
        for name in files
    }


def _is_table(path: str) -> bool:
    hidden = any(part.startswith((".", "_")) for part in path.split("/") if "=" not in part)
    return not hidden and format_of(path) is not None


def format_of(path: str) -> str | None:
    """Return the format of FORMATS that the suffix of `path` names, or None."""
    if path.startswith(_INLINE):
        return "jsonl"
    name = path.rsplit("/", 1)[-1].lower()
    for compressed in (".gz", ".bz2", ".xz"):
        if name.endswith(compressed) and not name.endswith(f".parquet{compressed}"):
            name = name.removesuffix(compressed)
    suffix = name.rpartition(".")[2]
    suffix = {"pq": "parquet", "ndjson": "jsonl"}.get(suffix, suffix)
    return suffix if suffix in FORMATS else None


def inline_url(rows: list[dict[str, Any]]) -> str:
    """Return a URL that contains `rows`, for a table that is in the job file itself."""
    lines = "".join(f"{json.dumps(row, default=str)}\n" for row in rows)
    return _INLINE + base64.b64encode(lines.encode()).decode()


def inspect_file(url: str) -> FileInfo:
    """Count the rows of the file at `url` and find its columns; no row of Parquet is read."""
    file_format = str(format_of(url))
    if file_format == "parquet":
        return parquet.inspect_file(url)
    return text.inspect_file(url, file_format)


def checksum(url: str) -> str:
    """Return a hash that changes with the file: of Parquet's footer, or of all bytes."""
    return parquet.checksum(url) if format_of(url) == "parquet" else text.checksum(url)


def read_rows(url: str, start: int, stop: int, schema: pa.Schema) -> pa.Table:
    """Return rows [start, stop) of the file at `url` with the columns of `schema`."""
    file_format = str(format_of(url))
    if file_format == "parquet":
        return parquet.read_rows(url, start, stop, schema)
    return text.read_rows(url, file_format, start, stop, schema)

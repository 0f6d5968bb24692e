"""The files of a prompt table: find them; inspect or read one, whatever its format."""

import posixpath
import re

import pyarrow as pa

from sdbatch import storage
from sdbatch.errors import PromptTableError
from sdbatch.prompts import parquet, text
from sdbatch.prompts.file_info import FileInfo
from sdbatch.urls import names_folder, without_secrets

_MAGIC = re.compile(r"[*\[]|\?(?![\w-]+=)")  # of a glob; `?name=value` is the query of a URL
FORMATS = ("parquet", "csv", "tsv", "json", "jsonl", "txt")


def find_files(paths: list[str]) -> dict[str, str]:
    """Return the table's files, name -> URL, sorted by name within each path.

    The URLs are as the job has them. The names hold no secrets: the output records them.
    """
    files: dict[str, str] = {}
    shown_urls: set[str] = set()
    if not paths:
        raise PromptTableError("prompts.path = []: must name at least one file.")
    for path in paths:
        for name, url in sorted(_expand(path)):
            shown = _shown(url)
            if shown in shown_urls:
                raise PromptTableError(
                    f"prompts.path = {shown} appears twice: list each file once."
                )
            shown_urls.add(shown)
            files[name if name not in files else shown] = url
    return files


def table_folder(path: str) -> str | None:
    """Return the file or folder that holds all of one `prompts.path`.

    None for a glob such as `*.csv`, which names no folder and reads none below its own.
    """
    glob = _MAGIC.search(path)
    if glob is None:
        return path
    fs, root = storage.connect(path)
    with storage.storage_errors(path):
        if fs.exists(root):  # its name has brackets
            return path
    folder = posixpath.dirname(f"{path[: glob.start()]}x")
    if not folder and "**" in path:
        return "."
    return folder if names_folder(folder) else None


def _expand(path: str) -> list[tuple[str, str]]:
    """Return the files of one file, folder or glob, as name and URL."""
    fs, root = storage.connect(path)
    with storage.storage_errors(path):
        if fs.isdir(root):
            base, files = root, [name for name in fs.find(root) if _is_table(name[len(root) :])]
        elif fs.exists(root):
            base, files = posixpath.dirname(_shown(root)), [root]
        else:
            base = posixpath.dirname(_MAGIC.split(root)[0] + "x")
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
    local, start = storage.is_local(path), len(_shown(base))
    return [
        (_shown(name)[start:].lstrip("/"), name if local else fs.unstrip_protocol(name))
        for name in files
    ]


def _shown(url: str) -> str:
    """Return a URL without its secrets; a local file may have any name."""
    return url if storage.is_local(url) else without_secrets(url)


def _is_table(path: str) -> bool:
    hidden = any(part.startswith((".", "_")) for part in path.split("/") if "=" not in part)
    return not hidden and format_of(path) is not None


def format_of(path: str) -> str | None:
    """Return the format of FORMATS that the suffix of `path` names, or None.

    A URL may have it before its query or at the end: `p.csv?sig=`, `get?file=p.csv`.
    """
    if "://" in path and (found := _format_of_name(path.partition("?")[0])):
        return found
    return _format_of_name(path)


def _format_of_name(path: str) -> str | None:
    name = path.rsplit("/", 1)[-1].lower()
    for compressed in (".gz", ".bz2", ".xz"):
        if name.endswith(compressed) and not name.endswith(f".parquet{compressed}"):
            name = name.removesuffix(compressed)
    suffix = name.rpartition(".")[2]
    suffix = {"pq": "parquet", "ndjson": "jsonl"}.get(suffix, suffix)
    return suffix if suffix in FORMATS else None


def inspect_file(url: str, sides: tuple[str, str]) -> FileInfo:
    """Count the rows of the file at `url`; find its columns and the largest sizes of its images.

    Args:
        url: of the file.
        sides: the names of the columns for height and width, whether the file has them or not.
    """
    file_format = str(format_of(url))
    if file_format == "parquet":
        return parquet.inspect_file(url, sides)
    return text.inspect_file(url, file_format, sides)


def checksum(url: str) -> str:
    """Return a hash that changes with the file: of Parquet's footer, or of all bytes."""
    return parquet.checksum(url) if format_of(url) == "parquet" else text.checksum(url)


def read_rows(url: str, start: int, stop: int, schema: pa.Schema) -> pa.Table:
    """Return rows [start, stop) of the file at `url` with the columns of `schema`."""
    file_format = str(format_of(url))
    if file_format == "parquet":
        return parquet.read_rows(url, start, stop, schema)
    return text.read_rows(url, file_format, start, stop, schema)

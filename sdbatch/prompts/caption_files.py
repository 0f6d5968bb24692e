"""A folder of captions, one .txt file for each picture, as those who train models have them.

The folder is one file of the table, FOLDER/*.txt: a row for each caption in the order of names, its
`id` the name without the suffix.
"""

import hashlib
import posixpath
from collections.abc import Iterable, Iterator

import pyarrow as pa

from sdbatch import storage
from sdbatch.errors import PromptTableError
from sdbatch.job import Reader
from sdbatch.prompts import rows
from sdbatch.prompts.file_info import MOST_ROW, FileInfo, row_too_long
from sdbatch.prompts.rows import Rows

SUFFIX = ".txt"
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jxl")
_TOGETHER = 500  # files that are read at a time


def inspect_folder(url: str, reader: Reader, sides: tuple[str, str]) -> FileInfo:
    """Count the captions of the folder whose files are `url`, FOLDER/*.txt."""
    count, schema, sizes = rows.inspect_rows(_rows(url, reader), url, sides)
    return FileInfo(count, schema, checksum(url), sizes, "captions")


def checksum(url: str) -> str:
    """Return the hash of all names and captions."""
    digest = hashlib.sha256()
    for name, content in _read(url):
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def read_rows(url: str, reader: Reader, span: tuple[int, int], schema: pa.Schema) -> pa.Table:
    """Return the rows of a span [start, stop) with the columns of `schema`."""
    return rows.read_range(_rows(url, reader), url, *span, schema)


def iter_tables(
    url: str, reader: Reader, schema: pa.Schema, span: tuple[int, int] | None = None
) -> Iterator[pa.Table]:
    """Yield all rows, or those of a span, with the columns of `schema`, a few at a time."""
    return rows.iter_tables(_rows(url, reader), url, schema, span)


def files_of(url: str) -> list[str]:
    """Return the paths of the captions in their filesystem, by name."""
    fs, root = storage.connect(posixpath.dirname(url))
    with storage.storage_errors(url):
        entries = fs.find(root, maxdepth=1, detail=True)
    paths = captions_in(entries) or [path for path in entries if _is_caption(path)]
    for path in paths:
        if (entries[path].get("size") or 0) > MOST_ROW:
            raise row_too_long(path)
    return sorted(paths)


def captions_in(paths: Iterable[str]) -> list[str]:
    """Return the captions among the files of a folder: those with a picture of the same name."""
    names = [*paths]
    pictures = {posixpath.splitext(path)[0] for path in names if is_picture(path)}
    return [path for path in names if _is_caption(path) and path[: -len(SUFFIX)] in pictures]


def is_picture(path: str) -> bool:
    """Return whether a file's name is that of a picture."""
    return path.lower().endswith(PICTURES)


def _is_caption(path: str) -> bool:
    return path.lower().endswith(SUFFIX) and not posixpath.basename(path).startswith((".", "_"))


def _read(url: str) -> Iterator[tuple[str, bytes]]:
    fs, _ = storage.connect(posixpath.dirname(url))
    paths = files_of(url)
    for start in range(0, len(paths), _TOGETHER):
        some = paths[start : start + _TOGETHER]
        with storage.storage_errors(url):
            contents = fs.cat(some)
        if isinstance(contents, bytes):  # of one file
            contents = {some[0]: contents}
        for path in some:
            yield posixpath.basename(path), contents[path]


def _rows(url: str, reader: Reader) -> Rows:
    end = 0
    encoding = "utf-8-sig" if reader.encoding == "utf-8" else reader.encoding
    for name, content in _read(url):
        try:
            prompt = content.decode(encoding).strip()
        except UnicodeError as error:
            raise PromptTableError(
                f"{posixpath.dirname(url)}/{name} = bytes that are not {reader.encoding.upper()}: "
                f"save the file as UTF-8, or name its encoding: "
                f"--set prompts.reader.encoding=cp1252"
            ) from error
        end += len(prompt)
        yield {"id": name[: -len(SUFFIX)], "prompt": prompt}, end

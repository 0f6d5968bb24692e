"""The files of a prompt table: find them; inspect or read one, whatever its format."""

import posixpath
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pyarrow as pa

from sdbatch import storage
from sdbatch.errors import PromptTableError
from sdbatch.job import READER_KEYS, Reader
from sdbatch.prompts import arrow, caption_files, formats, parquet, text, webdataset
from sdbatch.prompts.file_info import FileInfo
from sdbatch.prompts.folders import Folder, describe_left, sort_folder
from sdbatch.prompts.formats import BINARY
from sdbatch.urls import names_folder, without_secrets

_MAGIC = re.compile(r"[*\[]|\?(?![\w-]+=)")  # of a glob; `?name=value` is the query of a URL
CONCURRENT = 32  # inspected in parallel: the time is the store's latency, not CPU


class Found(NamedTuple):
    """The files of a table, and what is no part of it."""

    files: dict[str, str]  # name -> URL
    left: tuple[str, ...]  # "NAME: reason"


def find_files(paths: list[str], reader: Reader) -> Found:
    """Return the table's files, sorted by name within each path, and what its folders hold else.

    The URLs are as the job has them. The names hold no secrets: the output records them.
    """
    files: dict[str, str] = {}
    left: list[str] = []
    shown_urls: set[str] = set()
    if not paths:
        raise PromptTableError("prompts.path = []: must name at least one file.")
    for path in paths:
        taken, others = _expand(path, reader)
        left += others
        for name, url in sorted(taken):
            shown = _shown(url)
            if shown in shown_urls:
                raise PromptTableError(
                    f"prompts.path = {shown} appears twice: list each file once."
                )
            shown_urls.add(shown)
            files[name if name not in files else shown] = url
    return Found(files, tuple(left))


def local_files(path: str, reader: Reader) -> list[str]:
    """Return the paths of the files behind a local `prompts.path`, each caption included.

    Raises:
        PromptTableError: only pictures say that a folder holds captions, and they are not among
            the files.
    """
    found: list[str] = []
    for url in find_files([path], reader).files.values():
        if not url.endswith(f"/*{caption_files.SUFFIX}"):
            found.append(url)
        elif reader.format == "captions":
            found += caption_files.files_of(url)
        else:
            raise PromptTableError(
                f"prompts.path = {path}: a folder of captions, whose pictures are not sent: must "
                f"say so itself. --set prompts.reader.format=captions"
            )
    return found


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


def _expand(path: str, reader: Reader) -> tuple[list[tuple[str, str]], list[str]]:
    """Return the files of one file, folder or glob, as name and URL, and what is left."""
    fs, root = storage.connect(path)
    with storage.storage_errors(path):
        if fs.isdir(root):
            base = root
            folder = sort_folder(path, fs, [name[len(root) :] for name in fs.find(root)], reader)
        elif fs.exists(root):
            base, folder = posixpath.dirname(_shown(root)), Folder([root], {})
        else:
            base = posixpath.dirname(_MAGIC.split(root)[0] + "x")
            names = [name for name in fs.glob(root) if not fs.isdir(name)]
            folder = Folder.of_glob(names, reader)
    if reader.format == "captions" and not fs.isdir(root):
        raise PromptTableError(
            f"prompts.path = {path}: must be a folder, as prompts.reader.format is captions. Name "
            f"the folder of the captions."
        )
    start = len(_shown(base))

    def named(name: str) -> str:
        return _shown(name)[start:].lstrip("/")

    left = describe_left({named(name): reason for name, reason in folder.left.items()})
    if not folder.taken:
        found = f" It holds {'; '.join(left[:4])}." if left else ""
        raise PromptTableError(
            f"prompts.path = {path}: no such file, or no table in the folder.{found} Check the "
            f"path."
        )
    local = storage.is_local(path)
    urls = [name if local else fs.unstrip_protocol(name) for name in folder.taken]
    return [(named(name), url) for name, url in zip(folder.taken, urls, strict=True)], left


def _shown(url: str) -> str:
    """Return a URL without its secrets; a local file may have any name."""
    return url if storage.is_local(url) else without_secrets(url)


def inspect_files(urls: Iterable[str], reader: Reader, sides: tuple[str, str]) -> list[FileInfo]:
    """Inspect files; a PromptTableError if a key of `reader` is about none of them."""
    with ThreadPoolExecutor(CONCURRENT) as pool:
        infos = list(pool.map(lambda url: inspect_file(url, reader, sides), urls))
    found = {info.format for info in infos}
    for name, about in READER_KEYS.items():
        value = getattr(reader, name)
        if value != Reader.model_fields[name].default and not found & {*about}:
            raise PromptTableError(
                f"prompts.reader.{name} = {value!r}: is for {', '.join(about)}, and the table is "
                f"{', '.join(sorted(found))}. Leave it out, or set prompts.reader.format"
            )
    return infos


def inspect_file(url: str, reader: Reader, sides: tuple[str, str]) -> FileInfo:
    """Count the rows of the file at `url`; find its columns and the largest sizes of its images.

    Args:
        url: of the file.
        reader: how it is read, where it does not say it itself.
        sides: the names of the columns for height and width, whether the file has them or not.
    """
    kind = formats.kind_of(url, reader)
    if kind.format == "captions":
        return caption_files.inspect_folder(url, reader, sides)
    if kind.format not in BINARY:
        return text.inspect_file(url, kind, reader, sides)
    try:
        if kind.format == "parquet":
            return parquet.inspect_file(url, sides)
        if kind.format == "webdataset":
            return webdataset.inspect_file(url, sides)
        return arrow.inspect_file(url, sides)
    except PromptTableError as error:
        wrong = formats.describe_other(formats.read_head(url), kind.format)
        if wrong is None:
            raise
        raise PromptTableError(f"{url} = {wrong}") from error


def checksum(url: str, reader: Reader) -> str:
    """Return a hash that changes with the file: of Parquet's footer, or of all bytes."""
    kind = formats.kind_of(url, reader)
    if kind.format == "captions":
        return caption_files.checksum(url)
    if kind.format == "webdataset":
        return webdataset.checksum(url)
    return parquet.checksum(url) if kind.format == "parquet" else text.checksum(url)


def read_rows(url: str, reader: Reader, start: int, stop: int, schema: pa.Schema) -> pa.Table:
    """Return rows [start, stop) of the file at `url` with the columns of `schema`."""
    kind = formats.kind_of(url, reader)
    if kind.format == "captions":
        return caption_files.read_rows(url, reader, (start, stop), schema)
    if kind.format == "webdataset":
        return webdataset.read_rows(url, (start, stop), schema)
    if kind.format == "parquet":
        return parquet.read_rows(url, start, stop, schema)
    if kind.format == "arrow":
        return arrow.read_rows(url, start, stop, schema)
    return text.read_rows(url, kind, reader, (start, stop), schema)


def iter_tables(url: str, reader: Reader, schema: pa.Schema) -> Iterator[pa.Table]:
    """Yield all rows of the file at `url` with the columns of `schema`, a few at a time."""
    kind = formats.kind_of(url, reader)
    if kind.format == "captions":
        return caption_files.iter_tables(url, reader, schema)
    if kind.format == "webdataset":
        return webdataset.iter_tables(url, schema)
    if kind.format == "parquet":
        return parquet.iter_tables(url, schema)
    if kind.format == "arrow":
        return arrow.iter_tables(url, schema)
    return text.iter_tables(url, kind, reader, schema)


def iter_rows(
    url: str, reader: Reader, span: tuple[int, int], schema: pa.Schema
) -> Iterator[pa.Table]:
    """Yield rows [start, stop) of the file at `url`, so few at a time that they may be photos."""
    kind = formats.kind_of(url, reader)
    if kind.format == "captions":
        return caption_files.iter_tables(url, reader, schema, span)
    if kind.format == "webdataset":
        return webdataset.iter_tables(url, schema, span)
    if kind.format == "parquet":
        return parquet.iter_rows(url, span, schema)
    if kind.format == "arrow":
        return arrow.iter_rows(url, span, schema)
    return text.iter_tables(url, kind, reader, schema, span)

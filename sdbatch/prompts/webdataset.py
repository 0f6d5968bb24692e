"""A WebDataset tar file as a prompt table: a row for each sample, the members of one name.

.txt or .caption is the prompt, .json holds columns, a picture such as .jpg is `image`, .mask.png or
the like is `mask_image`; other members are ignored. Only headers and text are read until pictures
are needed. https://github.com/webdataset/webdataset
"""

import hashlib
import json
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa

from sdbatch import storage
from sdbatch.errors import PromptTableError, one_line
from sdbatch.job import PICTURES
from sdbatch.prompts import rows
from sdbatch.prompts.caption_files import is_picture
from sdbatch.prompts.file_info import MOST_PICTURE, MOST_ROW, FileInfo, row_too_long
from sdbatch.prompts.rows import FAULT, Row, Rows, check_surrogates

KEY = "__key__"  # the column with the name of the sample
_PROMPTS = ("txt", "caption")  # the first that a sample has is its prompt
_BLOCK = 512  # bytes of a header
_MOST_MEMBERS = 1000  # whose headers are kept in memory


def inspect_file(url: str, sides: tuple[str, str]) -> FileInfo:
    """Count the samples of the file at `url` and find columns and sizes."""
    seen: set[str] = set()
    count, schema, sizes = rows.inspect_rows(_rows(url, seen=seen), url, sides)
    for name in PICTURES:
        if name in seen:
            at = schema.get_field_index(name)
            field = pa.field(name, pa.binary())
            schema = schema.append(field) if at < 0 else schema.set(at, field)
    return FileInfo(count, schema, checksum(url), sizes, "webdataset")


def checksum(url: str) -> str:
    """Return the hash of the members' headers and of all text."""
    digest = hashlib.sha256()
    with _open(url) as tar:
        for member, suffix in _members(tar, url):
            digest.update(f"{member.name} {member.size} {member.mtime}\n".encode())
            if suffix in ("json", *_PROMPTS):
                digest.update(_content(tar, member, MOST_ROW))
    return digest.hexdigest()


def read_rows(url: str, span: tuple[int, int], schema: pa.Schema) -> pa.Table:
    """Return the samples of a span [start, stop) with the columns of `schema`."""
    return rows.read_range(_rows(url, schema.names, span[0]), url, *span, schema)


def iter_tables(
    url: str, schema: pa.Schema, span: tuple[int, int] | None = None
) -> Iterator[pa.Table]:
    """Yield all samples, or those of a span, with the columns of `schema`, a few at a time."""
    return rows.iter_tables(_rows(url, schema.names, span[0] if span else 0), url, schema, span)


@contextmanager
def _open(url: str) -> Iterator[tarfile.TarFile]:
    with storage.open_file(url) as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                yield tar
        except tarfile.TarError as error:
            raise _damaged(url, one_line(error)) from error


def _damaged(url: str, found: str) -> PromptTableError:
    return PromptTableError(
        f"{url} = {found}: must be a whole tar file, not compressed. Copy it again, or unpack it."
    )


def _members(tar: tarfile.TarFile, url: str) -> Iterator[tuple[tarfile.TarInfo, str]]:
    """Yield the files in a tar file, each with its suffix in lower case.

    Raises:
        PromptTableError: it is damaged after the first of them.
    """
    while (member := tar.next()) is not None:
        if len(tar.members) > _MOST_MEMBERS:  # type: ignore[attr-defined]
            tar.members = []  # type: ignore[attr-defined]
        folder, _, name = member.name.rpartition("/")
        stem, _, suffix = name.partition(".")
        if member.isfile() and stem and not folder.startswith("__MACOSX"):
            yield member, suffix.lower()
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)  # where tarfile found no header: it does not say why
    if tar.fileobj.read(_BLOCK).strip(b"\0"):
        raise _damaged(url, f"no header at byte {tar.offset:,}")


def _rows(url: str, pictures: Any = (), start: int = 0, seen: set[str] | None = None) -> Rows:
    """Yield the samples and how much was read up to their ends.

    Args:
        url: of the file.
        pictures: the columns whose pictures are read.
        start: the number of the first sample of which they are.
        seen: gets the columns for which there are pictures.
    """
    number, end, key, row = 0, 0, None, Row()
    with _open(url) as tar:
        for member, suffix in _members(tar, url):
            name = member.name.removeprefix("./")
            stem = name[: len(name) - len(suffix)].removesuffix(".")
            if stem != key:
                if key is not None:
                    yield _finish(row, key), end
                    number += 1
                key, row = stem, {KEY: stem}
            column = _column_of(suffix)
            if column is not None and seen is not None:
                seen.add(column)
            if suffix in ("json", *_PROMPTS):
                row[suffix] = _content(tar, member, MOST_ROW)
                end += len(row[suffix])
            elif column in pictures and number >= start:
                row[f".{column}"] = _content(tar, member, MOST_PICTURE + 1, whole=False)
                end += len(row[f".{column}"])
        if key is not None:
            yield _finish(row, key), end


def _column_of(suffix: str) -> str | None:
    """Return the column of a picture; None: the member is none."""
    kind, _, last = suffix.rpartition(".")
    if not is_picture(f".{last}") or kind not in ("", "mask"):
        return None
    return "mask_image" if kind else "image"


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo, most: int, whole: bool = True) -> bytes:
    """Return the bytes of a member, at most `most`; if it must be whole, it may not have more."""
    if whole and member.size > most:
        raise row_too_long(member.name)
    file = tar.extractfile(member)
    assert file is not None, "a member is a file"
    return file.read(most)


def _finish(members: Row, key: str) -> Row:
    """Return the row of a sample from the contents of its members."""
    where = f"sample {key!r}"
    row: Row = {}
    try:
        if "json" in members:
            row = json.loads(members["json"])
        texts = [members[name].decode().strip() for name in _PROMPTS if name in members]
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        return {FAULT: f"{where} = {error}: must be JSON and text in UTF-8"}
    if not isinstance(row, dict):
        return {FAULT: f"{where} = {members['json'][:80]!r}: must be a JSON object"}
    if texts and row.get("prompt") is None:
        row["prompt"] = texts[0]
    pictures = {name: members[f".{name}"] for name in PICTURES if f".{name}" in members}
    return check_surrogates({KEY: key, **row}, where) | pictures

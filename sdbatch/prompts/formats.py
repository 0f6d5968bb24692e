"""Which format a file of a prompt table has: by its name, then by its first bytes or lines.

Content that is no table, such as a git-lfs pointer, is refused here in one line.
"""

import codecs
import json
import re
from typing import Any, NamedTuple

from sdbatch import storage
from sdbatch.errors import PromptTableError
from sdbatch.job import TABLE_FORMATS, Reader

BINARY = ("parquet", "arrow", "webdataset")
_NO_SUFFIX = ("captions", "webdataset")
HEAD = 2**16  # bytes or characters at the start of a file, by which its format is recognised
_COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
_SUFFIXES = {
    **{name: name for name in TABLE_FORMATS if name not in _NO_SUFFIX},
    "pq": "parquet",
    "ndjson": "jsonl",
    "feather": "arrow",
    "ipc": "arrow",
    "arrows": "arrow",
    "tar": "webdataset",
}
_KNOWN = [name for name in TABLE_FORMATS if name not in _NO_SUFFIX]
_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_TABLES = {b"PAR1": "parquet", b"ARROW1": "arrow", b"\xff\xff\xff\xff": "arrow"}
_PICTURES = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF")
_PROMPT = re.compile(r"prompts?|captions?|negative_prompt", re.IGNORECASE)
_NAME = re.compile(r"[\w .-]{1,40}")
_MARKUP = re.compile(r"\s*<(!doctype|html|head|body|\?xml)", re.IGNORECASE)
_TEXT = "must be text, such as CSV or a prompt per line."


class Kind(NamedTuple):
    """The format of a file."""

    format: str  # of TABLE_FORMATS
    compression: str | None  # of text
    certain: bool = False  # the job says so; else the content of text may say otherwise


def kind_by_name(url: str) -> Kind | None:
    """Return the format that the name of a file says, or None.

    A URL may have it before its query or in it: `p.csv?sig=`, `get?file=p.csv&sig=`.
    """
    parts = re.split(r"[?&=#;]", url) if "://" in url else [url]
    return next(filter(None, map(_kind_of_name, parts)), None)


def _kind_of_name(path: str) -> Kind | None:
    name = path.rpartition("/")[2].lower()
    if path.endswith("/*.txt"):
        return Kind("captions", None)
    name, compression = _without_compression(name)
    file_format = _SUFFIXES.get(name.rpartition(".")[2])
    if file_format is None or (compression and file_format in BINARY):
        return None
    return Kind(file_format, compression)


def _without_compression(name: str) -> tuple[str, str | None]:
    for suffix, compression in _COMPRESSED.items():
        if name.endswith(suffix):
            return name.removesuffix(suffix), compression
    return name, None


def kind_of(url: str, reader: Reader) -> Kind:
    """Return the format of the file at `url`; open it only if neither job nor name say it.

    Raises:
        PromptTableError: nothing says it, or the file is no table.
    """
    named = kind_by_name(url)
    if named is not None and (named.format == "captions" or reader.format is None):
        return named
    if reader.format is not None:
        name = url.partition("?")[0] if "://" in url else url
        compression = None if reader.format in BINARY else _without_compression(name.lower())[1]
        return Kind(reader.format, compression, certain=True)
    head = read_head(url)
    for magic, file_format in _TABLES.items():
        if head.startswith(magic):
            return Kind(file_format, None)
    for magic, compression in _MAGIC.items():
        if head.startswith(magic):
            return Kind("txt", compression)  # its content is looked at when it is read
    if (wrong := describe_bytes(head)) is not None:
        raise PromptTableError(f"{url} = {wrong}")
    found = format_of_text("", head.decode("utf-8", "replace"))
    if not found:
        raise PromptTableError(
            f"{url} = text without a known suffix: must be one of {', '.join(_KNOWN)}. Rename it, "
            f"or say which: --set prompts.reader.format=txt"
        )
    return Kind(found, None)


def read_head(url: str) -> bytes:
    """Return the first bytes of a file."""
    with storage.open_file(url) as file:
        return bytes(file.read(HEAD))


def describe_bytes(head: bytes) -> str | None:
    """Return what a file is that begins with `head`, and the way out; None: maybe text."""
    if not head:
        return "an empty file: must hold rows. Write it again."
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "UTF-16: save the file as UTF-8, or --set prompts.reader.encoding=utf-16"
    return (
        _describe_binary(head)
        if _is_binary(head)
        else describe_text(head.decode("utf-8", "ignore"))
    )


def describe_other(head: bytes, file_format: str) -> str | None:
    """Return what a file of `head` is, if that is not `file_format`, and the way out."""
    own = any(head.startswith(m) for m, name in _TABLES.items() if name == file_format)
    return None if own else describe_bytes(head)


def _is_binary(head: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return True
    return b"\0" in head


def _describe_binary(head: bytes) -> str | None:
    if head.startswith(b"PK\x03\x04"):
        return "an Excel workbook or a ZIP file: must be text. Save the sheet as CSV, or unpack it."
    if head.startswith(_PICTURES):
        return f"a picture: {_TEXT} Choose another file."
    for magic, name in _TABLES.items():
        if head.startswith(magic):
            return (
                f"{name.title()}: must be named so. Rename it, or set prompts.reader.format={name}"
            )
    for magic, name in _MAGIC.items():
        if head.startswith(magic):
            suffix = next(suffix for suffix, value in _COMPRESSED.items() if value == name)
            return f"compressed with {name}: must be named so, with {suffix} at the end. Rename it."
    return f"binary data: {_TEXT} Choose another file." if b"\0" in head else None


def describe_text(head: str) -> str | None:
    """Return what a text is that holds no table, and the way out; None: maybe one."""
    if head.startswith("version https://git-lfs"):
        return (
            "a pointer of git-lfs, not the file: must be the file itself. Run `git lfs pull` in "
            "its repository."
        )
    if _MARKUP.match(head):
        return (
            "a page of HTML or XML, maybe an error of a server: must be the table. Download it "
            "again, from its direct link."
        )
    return None


def format_of_text(by_name: str, head: str) -> str:
    """Return the format of a text file whose name says `by_name`; "" if nothing says it.

    JSON Lines are often named .json, and CSV .txt.
    """
    lines = [line for line in re.split(r"\r\n|\r|\n", head) if line.strip()]
    first = lines[0].strip() if lines else ""
    if by_name == "json":
        return "jsonl" if _is_lines(first, len(lines)) else "json"
    if by_name == "jsonl":
        return "json" if _is_document(first, len(lines)) else "jsonl"
    if not by_name and (first in ("[", "{") or first[:2] in ("[{", '["', '{"')):
        return "jsonl" if _is_lines(first, len(lines)) else "json"
    if by_name in ("txt", ""):
        return _format_of_lines(lines) or by_name
    return by_name


def _format_of_lines(lines: list[str]) -> str:
    """Return the format of text that may be a prompt per line; "" if it may."""
    first = lines[0].strip() if lines else ""
    value = _json_or_none(first)
    if isinstance(value, dict) and any(map(_PROMPT.fullmatch, value)):
        return "jsonl"
    if first in ("[", "{") or (len(lines) == 1 and _is_document(first, 1)):
        return "json"
    return "csv" if _is_separated(lines) else ""


def _is_lines(first: str, lines: int) -> bool:
    """Return whether the first of several lines is a JSON value, or the only one a text."""
    value = _json_or_none(first)
    return value is not None and (lines > 1 or isinstance(value, str))


def _is_document(first: str, lines: int) -> bool:
    """Return whether a text is a JSON document, and no lines of JSON, by its first line."""
    if first in ("[", "{"):
        return True
    value = _json_or_none(first)
    if value is None:
        return first.startswith("[") and lines > 1
    of_rows = isinstance(value, list) and all(isinstance(each, dict | str) for each in value)
    return of_rows and lines == 1


def _json_or_none(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _is_separated(lines: list[str]) -> bool:
    """Return whether lines begin with a header that names prompts, and agree with it."""
    for separator in ("\t", ",", ";", "|"):
        header = [name.strip().strip('"') for name in lines[0].split(separator)] if lines else []
        if len(header) > 1 and all(map(_NAME.fullmatch, header)):
            known = any(map(_PROMPT.fullmatch, header))
            fewest = min((line.count(separator) for line in lines[1:20]), default=0)
            if known and fewest >= len(header) - 1:
                return True
    return False

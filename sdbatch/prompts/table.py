"""A prompt table as a whole: its files in a lasting order, its columns, what they are used for."""

import posixpath
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import get_args

import pyarrow as pa

from sdbatch import schema, storage
from sdbatch.errors import PromptTableError
from sdbatch.job import Column, Prompts, Sampling
from sdbatch.prompts import readers
from sdbatch.prompts.contents import MIXED, Contents, unite

_KINDS = {name: field.annotation for name, field in Sampling.model_fields.items()}
_NUMBERS = [name for name, kind in _KINDS.items() if kind in (int, float)]
_FLAGS = [name for name, kind in _KINDS.items() if kind is bool]
_HIVE = {b"sdbatch": b"hive folder"}  # metadata of a column that only the folders' names give
_ROWS = "rows.jsonl"  # what the table is called whose rows the job itself holds
_AT_ONCE = 32  # files looked at in parallel: the wait is the store's, not the processor's


@dataclass(frozen=True)
class Source:
    """A file of the table."""

    name: str  # relative to where prompts.path points, so that a moved table keeps its names
    url: str
    rows: int
    checksum: str


@dataclass(frozen=True)
class Table:
    """A prompt table whose files and columns are known; its prompts are still unread."""

    sources: tuple[Source, ...]
    columns: dict[str, str]  # our name -> the table's name, for those the table has
    schema: pa.Schema  # all that is read of a file: the columns above, then the extras
    extras: pa.Schema  # what travels into the output

    @property
    def rows(self) -> int:
        """Return the number of rows."""
        return sum(source.rows for source in self.sources)


def open_table(prompts: Prompts) -> Table:
    """Find the files of the table and their columns, reading no prompt of a Parquet file.

    Raises:
        PromptTableError: no file, no row, no prompt column, or columns that cannot be used.
    """
    files = find(prompts.paths) if prompts.rows is None else {_ROWS: readers.inline(prompts.rows)}
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        looks = list(pool.map(readers.look, files.values()))
    sources = tuple(
        Source(name, url, look.rows, look.checksum)
        for (name, url), look in zip(files.items(), looks, strict=True)
    )
    if not sum(source.rows for source in sources):
        where = ", ".join(prompts.paths)
        raise PromptTableError(f"prompts.path = {where}: holds no row. It must hold one at least.")
    found = _unite(looks, list(files.values()))
    for field in _partitions(files):
        if field.name not in found.names:
            found = found.append(field)
    columns = _columns(prompts, found)
    extras = _extras(prompts, found, columns)
    needed = [found.field(name) for name in dict.fromkeys(columns.values())]
    rest = [found.field(name) for name in extras.names if name not in columns.values()]
    return Table(sources, columns, pa.schema([*needed, *rest]), extras)


def read(source: Source, start: int, stop: int, table: pa.Schema) -> pa.Table:
    """Return rows [start, stop) of `source` with the columns of `table`, hive folders' too."""
    rows = readers.read(source.url, start, stop, table)
    for name, value in _hive(source.name).items():
        if name in table.names and table.field(name).metadata == _HIVE:
            at, values = table.get_field_index(name), [value] * rows.num_rows
            rows = rows.set_column(at, table.field(name), pa.array(values, pa.string()))
    return rows


def find(paths: list[str]) -> dict[str, str]:
    """Return the table's files, name -> URL, sorted by name within each path given."""
    files: dict[str, str] = {}
    seen: set[str] = set()
    if not paths:
        raise PromptTableError("prompts.path = []: must name a file at least.")
    for one in paths:
        for name, url in sorted(_find(one).items()):
            if url in seen:
                raise PromptTableError(f"prompts.path = {url} stands twice: name each file once.")
            seen.add(url)
            files[name if name not in files else url] = url
    return files


def _find(path: str) -> dict[str, str]:
    fs, root = storage.connect(path)
    with storage.errors(path):
        if fs.isdir(root):
            base, found = root, [name for name in fs.find(root) if _is_table(name[len(root) :])]
        elif fs.exists(root):
            base, found = posixpath.dirname(root), [root]
        else:
            base = posixpath.dirname(re.split(r"[*?\[]", root)[0] + "x")
            found = [name for name in fs.glob(root) if not fs.isdir(name)]
    if not found:
        raise PromptTableError(f"prompts.path = {path}: no such file, or no table in the folder.")
    for name in found:
        if readers.kind(name) is None:
            kinds = ", ".join(readers.KINDS)
            raise PromptTableError(f"prompts.path = {name}: must be one of {kinds}, by its suffix.")
    local = storage.is_local(path)
    return {
        name[len(base) :].lstrip("/"): name if local else fs.unstrip_protocol(name)
        for name in found
    }


def _is_table(path: str) -> bool:
    hidden = any(part.startswith((".", "_")) for part in path.split("/") if "=" not in part)
    return not hidden and readers.kind(path) is not None


def _unite(looks: Iterable[Contents], urls: list[str]) -> pa.Schema:
    known: pa.Schema | None = None
    for look, url in zip(looks, urls, strict=True):
        if known is None or look.schema.equals(known, check_metadata=True):
            known = look.schema
            continue
        try:
            known = unite(known, look.schema)
        except pa.ArrowException as error:
            text = " ".join(str(error).split())
            raise PromptTableError(
                f"{url} = {text} The columns of a table's files must agree."
            ) from error
    return known if known is not None else pa.schema([])


def _hive(name: str) -> dict[str, str]:
    parts = [part.partition("=") for part in name.split("/")[:-1] if "=" in part]
    return {key: value for key, _, value in parts}


def _partitions(files: Iterable[str]) -> list[pa.Field]:
    names = dict.fromkeys(key for name in files for key in _hive(name))
    return [pa.field(name, pa.string(), metadata=_HIVE) for name in names]


def _columns(prompts: Prompts, found: pa.Schema) -> dict[str, str]:
    have = ", ".join(found.names)
    if len(set(found.names)) != len(found.names):
        twice = next(name for name in found.names if found.names.count(name) > 1)
        raise PromptTableError(f"column {twice!r} stands twice in the table: rename one of them.")
    for ours, theirs in prompts.columns.items():
        if theirs not in found.names:
            raise PromptTableError(
                f"prompts.columns.{ours} = {theirs!r}: not in the table. It has: {have}."
            )
    same = [name for name in get_args(Column) if name != "id" and name in found.names]
    columns: dict[str, str] = {name: name for name in same} | dict(prompts.columns)
    if "prompt" not in columns:
        raise PromptTableError(
            f"the table has no column 'prompt'. It has: {have}. "
            f"Name the right one: --set prompts.columns.prompt={next(iter(found.names), 'NAME')}"
        )
    for name, theirs in columns.items():
        _check_type(name, found.field(theirs))
    return columns


def _check_type(ours: str, field: pa.Field) -> None:
    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    text = (
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )
    number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    fits = text or pa.types.is_null(kind) or (number and ours in (*_NUMBERS, "id"))
    fits = fits or (pa.types.is_boolean(kind) and ours in _FLAGS)
    if not fits or field.metadata == MIXED:
        must = "numbers" if ours in _NUMBERS else "true or false" if ours in _FLAGS else "text"
        held = "mixed types" if field.metadata == MIXED else str(field.type)
        raise PromptTableError(
            f"column {field.name!r} = {held}: must hold {must} to be used as {ours}."
        )


def _extras(prompts: Prompts, found: pa.Schema, columns: dict[str, str]) -> pa.Schema:
    if prompts.keep is not None:
        for name in prompts.keep:
            if name not in found.names or prompts.keep.count(name) > 1:
                have = ", ".join(found.names)
                raise PromptTableError(
                    f"prompts.keep = {name!r}: must be in the table, once. It has: {have}."
                )
        kept = [found.field(name) for name in prompts.keep]
    else:
        used = set(columns.values())
        if columns.get("id") not in schema.OUTPUT_NAMES:
            used.discard(columns.get("id", ""))  # stays, under its own name and type
        kept = [field for field in found if field.name not in used]
    for field in kept:
        if field.name in schema.OUTPUT_NAMES:
            rest = ", ".join(f.name for f in kept if f.name not in schema.OUTPUT_NAMES)
            raise PromptTableError(
                f"column {field.name!r} of the table = a name of the output's own: rename it, "
                f"or leave it out with --set 'prompts.keep=[{rest}]'"
            )
    return pa.schema([field.remove_metadata() for field in kept])

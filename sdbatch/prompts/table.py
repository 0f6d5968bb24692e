"""A prompt table as a whole: its files in a fixed order, its columns and what each is used for."""

import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sdbatch import schema
from sdbatch.errors import PromptTableError, one_line
from sdbatch.job import PICTURES, Prompts, Reader
from sdbatch.prompts import captions, files, inline
from sdbatch.prompts.columns import map_columns, select_extras
from sdbatch.prompts.extras import drop_unequal_features, output_field
from sdbatch.prompts.file_info import FileInfo
from sdbatch.prompts.sizes import Size, Sizes, read_side, side_columns
from sdbatch.prompts.types import settled, unite_schemas

# Metadata of a column that only the folders' names contain, and of the one with the file's name.
_HIVE, _SOURCE = {b"sdbatch": b"hive folder"}, {b"sdbatch": b"file name"}
_METADATA = re.compile(r"(^|/)metadata\.(jsonl|csv|parquet)$")  # of a folder of images
_CAPTIONS = {b"sdbatch": b"captions"}  # of the prompts, if they are in lists


@dataclass(frozen=True)
class Source:
    """A file of the table."""

    name: str  # relative to prompts.path, so that a moved table keeps its names
    url: str
    rows: int
    checksum: str
    captions: int | None = None  # where the prompts are in lists

    @property
    def prompts(self) -> int:
        """Return the number of prompts."""
        return self.rows if self.captions is None else self.captions


@dataclass(frozen=True)
class Table:
    """A prompt table whose files and columns are known; its prompts are not read yet."""

    sources: tuple[Source, ...]
    columns: dict[str, str]  # our name -> the table's name, for those the table has
    schema: pa.Schema  # the columns to read of a file: those above, then the extras
    pictures: pa.Schema  # those of them with pictures, which are read a few rows at a time
    extras: pa.Schema  # the table's own columns, copied into the output, with its types
    sizes: Sizes  # the largest of its rows
    names: tuple[str, ...]  # of all its columns
    left: tuple[str, ...] = ()  # files that are not part of it, each "NAME: reason"

    @property
    def rows(self) -> int:
        """Return the number of rows, with a prompt each: where they are in lists, of captions."""
        return sum(source.prompts for source in self.sources)


def open_table(prompts: Prompts, reserved: Sequence[str] = ()) -> Table:
    """Find the files of the table and their columns, reading no prompt of a Parquet file.

    Args:
        prompts: the job's section.
        reserved: names of columns that the job's stages add to the output.

    Raises:
        PromptTableError: no file, no row, no prompt column, or columns that cannot be used.
    """
    sides = side_columns(prompts)
    if prompts.rows is None:
        urls, left = files.find_files(prompts.paths, prompts.reader)
        infos = files.inspect_files(urls.values(), prompts.reader, sides)
    else:
        left = ()
        urls, infos = {inline.NAME: inline.WHERE}, [inline.inspect_rows(prompts.rows, sides)]
    sources = tuple(
        Source(name, url, info.rows, info.checksum)
        for (name, url), info in zip(urls.items(), infos, strict=True)
    )
    if not sum(source.rows for source in sources):
        where = ", ".join(prompts.paths)
        raise PromptTableError(f"prompts.path = {where}: holds no row. It must have at least one.")
    present = _all_columns(prompts, infos, urls)
    separated = any(info.format in ("csv", "tsv") for info in infos)
    needs_header = separated and prompts.reader.names is None
    metadata = all(map(_METADATA.search, urls))
    columns = map_columns(prompts, present, needs_header=needs_header, metadata=metadata)
    own = select_extras(
        prompts, present, columns, {*schema.OUTPUT_NAMES, schema.INPUTS.name, *reserved}
    )
    to_read, pictures = _columns_to_read(present, columns, own)
    sources = _count_captions(sources, to_read, prompts)
    hive = [name if _is_hive(name, present) else "" for name in sides]
    sizes = (
        size
        for name, info in zip(urls, infos, strict=True)
        for size in _fill_sizes(info.sizes, _hive_values(name), hive)
    )
    return Table(
        sources=sources,
        columns=columns,
        schema=to_read,
        pictures=pictures,
        extras=pa.schema([output_field(field) for field in own]),
        sizes=Sizes(sizes),
        names=tuple(present.names),
        left=left,
    )


def read_rows(
    source: Source,
    start: int,
    stop: int,
    table: pa.Schema,
    in_job: inline.Rows | None = None,
    reader: Reader = Reader(),  # noqa: B008  a frozen value
) -> pa.Table:
    """Return rows [start, stop) of `source` with the columns of `table`, hive folders' included.

    Where prompts are in lists, a row is a caption; the rows returned are those that hold them, and
    `captions.prompts_of` begins at caption `start`.

    Args:
        source: a file of the table.
        start: the number of the first row in the file.
        stop: the number of the row after the last.
        table: the columns to read.
        in_job: the rows, if they are in the job file.
        reader: how the file is read, where it does not say it itself.
    """
    column = _captions_column(table)
    first, last = start, stop
    if column is not None:
        ends = _caption_ends(source, column, in_job, reader)
        first, last = captions.find_rows(ends, start, stop)
    if in_job is not None:
        rows = inline.read_rows(in_job, first, last, table)
    else:
        rows = files.read_rows(source.url, reader, first, last, table)
    rows = _set_names(rows, source, table)
    return rows if column is None else captions.mark(rows, ends, first, start)


def iter_pictures(
    source: Source,
    span: tuple[int, int],
    pictures: pa.Schema,
    in_job: inline.Rows | None = None,
    reader: Reader = Reader(),  # noqa: B008  a frozen value
) -> Iterator[pa.Table]:
    """Yield the columns with pictures of rows [start, stop) of `source`, a few rows at a time."""
    if in_job is not None:
        yield _set_names(inline.read_rows(in_job, *span, pictures), source, pictures)
        return
    for rows in files.iter_rows(source.url, reader, span, pictures):
        yield _set_names(rows, source, pictures)


def iter_tables(
    source: Source,
    table: pa.Schema,
    in_job: inline.Rows | None = None,
    reader: Reader = Reader(),  # noqa: B008  a frozen value
) -> Iterator[pa.Table]:
    """Yield all rows of `source` as `read_rows` returns them, a few in memory at a time."""
    if in_job is not None:
        yield _set_names(inline.read_rows(in_job, 0, len(in_job), table), source, table)
        return
    for rows in files.iter_tables(source.url, reader, table):
        yield _set_names(rows, source, table)


def _set_names(rows: pa.Table, source: Source, table: pa.Schema) -> pa.Table:
    """Fill the columns that folders and files give by their names."""
    values = _hive_values(source.name)
    for index, field in enumerate(table):
        value = source.name if field.metadata == _SOURCE else values.get(field.name)
        if field.metadata in (_HIVE, _SOURCE) and value is not None:
            column = pa.array([value] * rows.num_rows, pa.string())
            rows = rows.set_column(index, field, column)
    return rows


def _columns_to_read(
    present: pa.Schema, columns: dict[str, str], own: Sequence[pa.Field]
) -> tuple[pa.Schema, pa.Schema]:
    """Return the columns to read of a file, those in `own` last, and the columns of pictures."""
    pictures = {columns[name] for name in PICTURES if name in columns}
    names = [*dict.fromkeys(name for ours, name in columns.items() if ours not in PICTURES)]
    needed = [present.field(name) for name in names]
    needed = [_marked(field) if field.name == columns["prompt"] else field for field in needed]
    rest = [field for field in own if field.name not in names]
    of_pictures = [field for field in present if field.name in pictures]
    return pa.schema([*needed, *rest]), pa.schema(of_pictures)


def _marked(prompt: pa.Field) -> pa.Field:
    return prompt.with_metadata(_CAPTIONS) if captions.are_in(prompt.type) else prompt


def _captions_column(table: pa.Schema) -> pa.Field | None:
    return next((field for field in table if field.metadata == _CAPTIONS), None)


def _count_captions(
    sources: Sequence[Source], table: pa.Schema, prompts: Prompts
) -> tuple[Source, ...]:
    column = _captions_column(table)
    if column is None:
        return tuple(sources)

    def count(source: Source) -> Source:
        ends = _caption_ends(source, column, prompts.rows, prompts.reader)
        return replace(source, captions=int(ends[-1]) if len(ends) else 0)

    with ThreadPoolExecutor(files.CONCURRENT) as pool:
        return tuple(pool.map(count, sources))


def _caption_ends(
    source: Source, column: pa.Field, in_job: inline.Rows | None, reader: Reader
) -> NDArray[np.int64]:
    """Return for each row of a file the captions up to its end; no footer says them by row."""
    if in_job is not None:
        return captions.count([inline.read_rows(in_job, 0, len(in_job), pa.schema([column]))[0]])
    return _file_caption_ends(source.url, source.checksum, column, reader.model_dump_json())


@lru_cache(8)  # or each shard would read the column again
def _file_caption_ends(url: str, checksum: str, column: pa.Field, reader: str) -> NDArray[np.int64]:
    found = files.iter_tables(url, Reader.model_validate_json(reader), pa.schema([column]))
    return captions.count(rows[0] for rows in found)


def _all_columns(prompts: Prompts, infos: Sequence[FileInfo], urls: dict[str, str]) -> pa.Schema:
    """Return the columns of the files, with those that folders' and files' names give."""
    present = _unite_files(infos, list(urls.values()))
    for field in (*_hive_fields(urls), *_source_field(prompts, present)):
        if field.name not in present.names:
            present = present.append(field)
    return present


def _unite_files(infos: Sequence[FileInfo], urls: list[str]) -> pa.Schema:
    united: pa.Schema = pa.schema([])
    for info, url in zip(infos, urls, strict=True):
        if info is infos[0] or info.schema.equals(united, check_metadata=True):
            united = info.schema
            continue
        try:
            united = unite_schemas(united, info.schema)
        except pa.ArrowException as error:
            raise PromptTableError(
                f"{url} = {one_line(error)} The columns of a table's files must agree."
            ) from error
    return drop_unequal_features(settled(united), [info.schema for info in infos])


def _hive_values(name: str) -> dict[str, str]:
    """Return the values that the folders of a file set, as Hive names them: `lang=de/`."""
    parts = [part.partition("=") for part in name.split("/")[:-1] if "=" in part]
    return {key: value for key, _, value in parts}


def _hive_fields(names: Iterable[str]) -> list[pa.Field]:
    keys = dict.fromkeys(key for name in names for key in _hive_values(name))
    return [pa.field(key, pa.string(), metadata=_HIVE) for key in keys]


def _is_hive(name: str, present: pa.Schema) -> bool:
    return name in present.names and present.field(name).metadata == _HIVE


def _source_field(prompts: Prompts, present: pa.Schema) -> list[pa.Field]:
    """Return the column with the file's name, if the job wants one."""
    if prompts.source is None:
        return []
    if prompts.source in present.names:
        raise PromptTableError(
            f"prompts.source = {prompts.source!r}: must be a name that the table does not have. "
            f"It has: {', '.join(present.names)}."
        )
    return [pa.field(prompts.source, pa.string(), metadata=_SOURCE)]


def _fill_sizes(sizes: Sizes, folders: dict[str, str], sides: list[str]) -> Iterator[Size]:
    """Yield the sizes of a file's rows with the sides that its folders set."""
    for height, width in sizes:
        with suppress(ValueError):  # all rows of the file will fail
            set_by_folders = [read_side(folders.get(name)) for name in sides]
            yield height or set_by_folders[0], width or set_by_folders[1]

"""A prompt table as a whole: its files in a fixed order, its columns and what each is used for."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import pyarrow as pa

from sdbatch import schema
from sdbatch.errors import PromptTableError, one_line
from sdbatch.job import COLUMNS, Prompts, Reader, Sampling
from sdbatch.prompts import files, inline
from sdbatch.prompts.file_info import FileInfo
from sdbatch.prompts.sizes import Size, Sizes, read_side, side_columns
from sdbatch.prompts.types import settled, unite_schemas

_TYPES = {name: field.annotation for name, field in Sampling.model_fields.items()}
_NUMBERS = [name for name, kind in _TYPES.items() if kind in (int, float)]
_FLAGS = [name for name, kind in _TYPES.items() if kind is bool]
_HIVE = {b"sdbatch": b"hive folder"}  # metadata of a column that only the folders' names contain


@dataclass(frozen=True)
class Source:
    """A file of the table."""

    name: str  # relative to prompts.path, so that a moved table keeps its names
    url: str
    rows: int
    checksum: str


@dataclass(frozen=True)
class Table:
    """A prompt table whose files and columns are known; its prompts are not read yet."""

    sources: tuple[Source, ...]
    columns: dict[str, str]  # our name -> the table's name, for those the table has
    schema: pa.Schema  # the columns to read of a file: those above, then the extras
    extras: pa.Schema  # the table's own columns, copied into the output
    sizes: Sizes  # the largest of its rows
    left: tuple[str, ...] = ()  # what its folders hold else, "NAME: reason"

    @property
    def rows(self) -> int:
        """Return the number of rows."""
        return sum(source.rows for source in self.sources)


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
    present = _unite_files(infos, list(urls.values()))
    for field in _hive_fields(urls):
        if field.name not in present.names:
            present = present.append(field)
    columns = _map_columns(prompts, present)
    extras = _select_extras(prompts, present, columns, {*schema.OUTPUT_NAMES, *reserved})
    needed = [present.field(name) for name in dict.fromkeys(columns.values())]
    rest = [present.field(name) for name in extras.names if name not in columns.values()]
    hive = [name if _is_hive(name, present) else "" for name in sides]
    sizes = Sizes(
        size
        for name, info in zip(urls, infos, strict=True)
        for size in _fill_sizes(info.sizes, _hive_values(name), hive)
    )
    return Table(sources, columns, pa.schema([*needed, *rest]), extras, sizes, left)


def read_rows(
    source: Source,
    start: int,
    stop: int,
    table: pa.Schema,
    in_job: inline.Rows | None = None,
    reader: Reader = Reader(),  # noqa: B008 - frozen
) -> pa.Table:
    """Return rows [start, stop) of `source` with the columns of `table`, hive folders' included.

    Args:
        source: a file of the table.
        start: the number of the first row in the file.
        stop: the number of the row after the last.
        table: the columns to read.
        in_job: the rows, if they are in the job file.
        reader: how the file is read, where it does not say it itself.
    """
    if in_job is not None:
        return inline.read_rows(in_job, start, stop, table)
    rows = files.read_rows(source.url, reader, start, stop, table)
    for name, value in _hive_values(source.name).items():
        if _is_hive(name, table):
            index, values = table.get_field_index(name), [value] * rows.num_rows
            rows = rows.set_column(index, table.field(name), pa.array(values, pa.string()))
    return rows


def _unite_files(infos: Iterable[FileInfo], urls: list[str]) -> pa.Schema:
    """Return the columns of all files; those without any value are text."""
    united: pa.Schema | None = None
    for info, url in zip(infos, urls, strict=True):
        if united is None or info.schema.equals(united, check_metadata=True):
            united = info.schema
            continue
        try:
            united = unite_schemas(united, info.schema)
        except pa.ArrowException as error:
            raise PromptTableError(
                f"{url} = {one_line(error)} The columns of a table's files must agree."
            ) from error
    return settled(united) if united is not None else pa.schema([])


def _hive_values(name: str) -> dict[str, str]:
    """Return the values that the folders of a file set, as Hive names them: `lang=de/`."""
    parts = [part.partition("=") for part in name.split("/")[:-1] if "=" in part]
    return {key: value for key, _, value in parts}


def _hive_fields(names: Iterable[str]) -> list[pa.Field]:
    keys = dict.fromkeys(key for name in names for key in _hive_values(name))
    return [pa.field(key, pa.string(), metadata=_HIVE) for key in keys]


def _is_hive(name: str, present: pa.Schema) -> bool:
    return name in present.names and present.field(name).metadata == _HIVE


def _fill_sizes(sizes: Sizes, folders: dict[str, str], sides: list[str]) -> Iterator[Size]:
    """Yield the sizes of a file's rows with the sides that its folders set."""
    for height, width in sizes:
        with suppress(ValueError):  # all rows of the file will fail
            set_by_folders = [read_side(folders.get(name)) for name in sides]
            yield height or set_by_folders[0], width or set_by_folders[1]


def _map_columns(prompts: Prompts, present: pa.Schema) -> dict[str, str]:
    """Return our name -> the table's name; a column of our name is used unless the job maps it."""
    known = ", ".join(present.names)
    if len(set(present.names)) != len(present.names):
        repeated = next(name for name in present.names if present.names.count(name) > 1)
        raise PromptTableError(
            f"column {repeated!r} appears twice in the table: rename one of them."
        )
    for ours, theirs in prompts.columns.items():
        if theirs not in present.names:
            raise PromptTableError(
                f"prompts.columns.{ours} = {theirs!r}: not in the table. It has: {known}."
            )
    same = [name for name in COLUMNS if name != "id" and name in present.names]
    columns: dict[str, str] = {name: name for name in same} | dict(prompts.columns)
    if "prompt" not in columns:
        example = next(iter(present.names), "NAME")
        raise PromptTableError(
            f"the table has no column 'prompt'. It has: {known}. "
            f"Name the right one: --set prompts.columns.prompt={example}"
        )
    for name, theirs in columns.items():
        _check_type(name, present.field(theirs))
    return columns


def _check_type(ours: str, field: pa.Field) -> None:
    value_type = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    text = (
        pa.types.is_string(value_type)
        or pa.types.is_large_string(value_type)
        or pa.types.is_string_view(value_type)
    )
    number = (
        pa.types.is_integer(value_type)
        or pa.types.is_floating(value_type)
        or pa.types.is_decimal(value_type)
    )
    fits = text or pa.types.is_null(value_type) or (number and ours in (*_NUMBERS, "id"))
    fits = fits or (pa.types.is_boolean(value_type) and ours in _FLAGS)
    if not fits:  # JSON text, of mixed types, is looked at row by row
        expected = "numbers" if ours in _NUMBERS else "true or false" if ours in _FLAGS else "text"
        raise PromptTableError(
            f"column {field.name!r} = {field.type}: must hold {expected} to be used as {ours}."
        )


def _select_extras(
    prompts: Prompts, present: pa.Schema, columns: dict[str, str], reserved: set[str]
) -> pa.Schema:
    """Return the table's own columns that go into the output: those in `keep`, else all unused."""
    if prompts.keep is not None:
        for name in prompts.keep:
            if name not in present.names or prompts.keep.count(name) > 1:
                raise PromptTableError(
                    f"prompts.keep = {name!r}: must be in the table, once. "
                    f"It has: {', '.join(present.names)}."
                )
        extras = [present.field(name) for name in prompts.keep]
    else:
        used = set(columns.values())
        if columns.get("id") not in reserved:
            used.discard(columns.get("id", ""))  # stays an extra, under its own name and type
        extras = [field for field in present if field.name not in used]
    for field in extras:
        if field.name in reserved:
            rest = ", ".join(f.name for f in extras if f.name not in reserved)
            raise PromptTableError(
                f"column {field.name!r} of the table = the name of an output column: rename it, "
                f"or exclude it with --set 'prompts.keep=[{rest}]'"
            )
    return pa.schema([field.remove_metadata() for field in extras])

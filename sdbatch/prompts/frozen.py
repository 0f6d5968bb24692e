"""A table whose own columns have the types of an output that was begun with fewer files."""

from collections.abc import Container
from dataclasses import replace

import pyarrow as pa

from sdbatch.errors import PromptTableError
from sdbatch.job import Prompts
from sdbatch.prompts.table import Source, Table, read_rows
from sdbatch.prompts.types import is_text

_ROWS = 20_000  # whose values are looked at together


def with_types(table: Table, frozen: pa.Schema, prompts: Prompts, known: Container[str]) -> Table:
    """Return `table` with the types of `frozen` for its own columns, which are the same.

    Args:
        table: with files that the output does not know yet.
        frozen: the table's own columns, as the output has them.
        prompts: the job's section.
        known: names of files that the output knows.

    Raises:
        PromptTableError: a new file has a value that its column's type cannot hold without loss.
    """
    changed = [
        name for name in frozen.names if table.extras.field(name).type != frozen.field(name).type
    ]
    for source in table.sources:
        if source.name not in known:
            for name in changed:
                _check(source, table.schema.field(name), frozen.field(name), prompts)
    schema = pa.schema(
        frozen.field(field.name) if field.name in changed else field for field in table.schema
    )
    return replace(table, schema=schema, extras=frozen)


def _check(source: Source, found: pa.Field, frozen: pa.Field, prompts: Prompts) -> None:
    """Raise a PromptTableError if a value of a file's column does not fit the type of `frozen`."""
    if is_text(frozen.type) and is_text(found.type):
        return
    schema = pa.schema([frozen])
    try:
        for start in range(0, source.rows, _ROWS):
            stop = min(start + _ROWS, source.rows)
            read_rows(source, start, stop, schema, prompts.rows, prompts.reader)
    except PromptTableError as error:
        raise PromptTableError(
            f"{source.url} column {frozen.name!r} = {found.type}: must be {frozen.type}, as in "
            f"the existing output. Write it so, or put the file into an output of its own."
        ) from error

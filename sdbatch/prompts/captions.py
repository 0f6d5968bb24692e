"""Prompts in lists: a row of the table that has several captions, each of which is a prompt.

A caption is a row of its own to all that follows, with the key ROW-0, ROW-1, ... A row whose list
is null or empty counts as one without a prompt, which fails: so no row is lost.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

_PLACE = b"captions"  # metadata of rows that were read for their captions


def are_in(kind: pa.DataType) -> bool:
    """Tell whether a column of the type holds lists of text."""
    lists = (
        pa.types.is_list(kind)
        or pa.types.is_large_list(kind)
        or pa.types.is_fixed_size_list(kind)
        or pa.types.is_list_view(kind)
        or pa.types.is_large_list_view(kind)
    )
    return bool(lists) and bool(
        pa.types.is_string(kind.value_type)
        or pa.types.is_large_string(kind.value_type)
        or pa.types.is_string_view(kind.value_type)
    )


def count(columns: Iterable[pa.ChunkedArray]) -> NDArray[np.int64]:
    """Return for each row of a file the captions up to its end.

    Args:
        columns: the lists of all its rows, in parts.
    """
    counts = [np.maximum(_lengths(chunk), 1) for column in columns for chunk in column.chunks]
    return np.cumsum(np.concatenate([np.zeros(0, np.int64), *counts]))


def find_rows(ends: NDArray[np.int64], start: int, stop: int) -> tuple[int, int]:
    """Return the rows [first, last) of a file that hold its captions [start, stop)."""
    first, last = np.searchsorted(ends, [start, stop - 1], side="right")
    return int(first), int(last) + 1


def mark(rows: pa.Table, ends: NDArray[np.int64], first: int, start: int) -> pa.Table:
    """Return `rows`, from row `first` of their file on, with the place of caption `start`."""
    before = int(ends[first - 1]) if first else 0
    return rows.replace_schema_metadata({_PLACE: json.dumps([first, start - before])})


def first_row(rows: pa.Table, start: int) -> int:
    """Return the number in the file of the first of `rows`, which were read from `start` on."""
    place = (rows.schema.metadata or {}).get(_PLACE)
    return int(json.loads(place)[0]) if place else start


@dataclass(frozen=True)
class Prompts:
    """The prompts of some rows: of each its text, its row, and its place in the row's list."""

    texts: list[str | None]
    rows: NDArray[np.int64]  # index in the table that holds them
    elements: NDArray[np.int64] | None  # None: a prompt a row
    first_row: int | None  # number in the file of the table's first row; None: not known here


def prompts_of(rows: pa.Table, column: str) -> Prompts:
    """Return the prompts of `rows`, from the caption on that `mark` has noted."""
    if not are_in(rows[column].type):
        return Prompts(rows[column].to_pylist(), np.arange(len(rows)), None, None)
    lists = rows[column]
    lengths = np.concatenate([np.zeros(0, np.int64), *map(_lengths, lists.chunks)])
    counts = np.maximum(lengths, 1)
    parents = np.repeat(np.arange(len(counts)), counts)
    elements = np.arange(len(parents)) - np.repeat(np.cumsum(counts) - counts, counts)
    texts: list[str | None] = []
    values = iter([text for chunk in lists.chunks for text in pc.list_flatten(chunk).to_pylist()])
    for parent in parents:
        texts.append(next(values) if lengths[parent] else None)
    place = (rows.schema.metadata or {}).get(_PLACE)
    first_row, skipped = json.loads(place) if place else (None, 0)
    return Prompts(texts[skipped:], parents[skipped:], elements[skipped:], first_row)


def _lengths(lists: pa.Array) -> NDArray[np.int64]:
    lengths = pc.list_value_length(lists).fill_null(0)
    return np.asarray(lengths.to_numpy(zero_copy_only=False), np.int64)

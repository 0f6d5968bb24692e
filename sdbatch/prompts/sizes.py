"""The largest image that the rows of a table ask for, found while the table is counted.

A row sets both sides of its image, one, or none; the job has the others. Of the rows that set the
same sides the largest counts. A row with an invalid side fails later and does not count.
"""

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any, TypeAlias

from pydantic import TypeAdapter, ValidationError

from sdbatch.job import Prompts, Sampling
from sdbatch.sampling import Pixels

Size: TypeAlias = tuple[int | None, int | None]  # height and width in pixels; None: the job's
SIDES = ("height", "width")
_NO_COLUMN = "\0"  # the name of a side that the job switches off, which no table has
_SIDE = TypeAdapter(Pixels)
_LONGEST = 32  # characters of a text that is remembered


def side_columns(prompts: Prompts) -> tuple[str, str]:
    """Return the table's names of the columns for height and width, whether it has them or not."""
    height, width = (prompts.columns.get(name, name) or _NO_COLUMN for name in SIDES)
    return height, width


class Sizes:
    """The largest sizes of the rows so far, at most one for each choice of sides that are set."""

    def __init__(self, sizes: Iterable[Size] = ()) -> None:
        self._largest: dict[tuple[bool, bool], Size] = {}
        for size in sizes:
            self.add(size)

    def __iter__(self) -> Iterator[Size]:
        return iter(self._largest.values())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sizes) and self._largest == other._largest

    def add(self, size: Size) -> None:
        """Count a size of rows."""
        kind = size[0] is None, size[1] is None
        if kind not in self._largest or _pixels(size) > _pixels(self._largest[kind]):
            self._largest[kind] = size

    def add_row(self, height: Any, width: Any) -> None:
        """Count a row by its two cells."""
        try:
            self.add((read_side(height), read_side(width)))
        except ValueError:
            return  # the row will fail

    def largest(self, sampling: Sampling) -> tuple[int, int]:
        """Return height and width of the largest image: of a row, or of the job."""
        sizes = [(height or sampling.height, width or sampling.width) for height, width in self]
        return max([(sampling.height, sampling.width), *sizes], key=_pixels)


def _pixels(size: Size) -> int:
    height, width = size
    return (height or 1) * (width or 1)


def read_side(cell: Any) -> int | None:
    """Return the pixels that a cell sets; None if it sets none.

    Raises:
        ValueError: no row can be drawn with it.
    """
    if cell is None or cell == "":
        return None
    known = isinstance(cell, int | float) or (isinstance(cell, str) and len(cell) <= _LONGEST)
    pixels = _known_pixels(cell) if known else _read_pixels(cell)
    if not pixels:
        raise ValueError("not a side of an image")
    return pixels


def _read_pixels(cell: Any) -> int:
    try:
        return _SIDE.validate_python(cell)
    except ValidationError:
        return 0


_known_pixels = lru_cache(10_000)(_read_pixels)

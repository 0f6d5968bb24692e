"""Chooses images of an output: the first, a random sample, those that match conditions."""

import contextlib
import difflib
import itertools
import operator
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sdbatch.errors import SdbatchError
from sdbatch.output.reader import Images
from sdbatch.report.scores import SCORE_COLUMNS, read_scores

# A column of the prompt table may have spaces in its name. `==` is not an operator.
_CONDITION = re.compile(r"\s*([^\s<>=!~][^<>=!~]*?)\s*(<=|>=|!=|=|<|>|~)(?!=)\s*(.*?)\s*")
_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "!=": operator.ne,
    "=": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
    "~": lambda value, part: str(part).lower() in str(value).lower(),
}
_BOOLEANS = {"true": True, "false": False}


@dataclass(frozen=True, slots=True)
class Condition:
    """A condition `column operator value` on a row; null matches only `!=`."""

    column: str
    operator: str
    value: str

    def matches(self, row: dict[str, Any]) -> bool:
        """Tell whether `row` matches; an SdbatchError if the types differ."""
        value = row[self.column]
        if value is None:
            return self.operator == "!="
        return _OPERATORS[self.operator](value, self._parse_value(value))

    def _parse_value(self, example: Any) -> Any:
        """Return the condition's value as the type of `example`, a value of the column."""
        if self.operator == "~" or isinstance(example, str):
            return self.value
        if isinstance(example, bool) and self.value.lower() in _BOOLEANS:
            return _BOOLEANS[self.value.lower()]
        if isinstance(example, int | float) and not isinstance(example, bool):
            for number in (int, float):  # int first: a float cannot hold all digits of a seed
                with contextlib.suppress(ValueError):
                    return number(self.value)
        text = f"{self.column}{self.operator}{self.value}"
        raise SdbatchError(
            f"--where = {text!r}: cannot be compared with {example!r}, a value of the column. Use "
            f"a value of the same type, or `~` to search its text."
        )


def parse_condition(text: str) -> Condition:
    """Parse a condition such as `guidance_scale>=5`, `sampler=ddim` or `prompt~cat`."""
    match = _CONDITION.fullmatch(text)
    if match is None:
        raise SdbatchError(
            f"--where = {text!r}: must be a column, an operator ({' '.join(_OPERATORS)}) and a "
            f"value. For example guidance_scale>=5 or prompt~cat."
        )
    return Condition(*match.groups())


def choose_rows(
    images: Images, count: int, seed: int | None, where: Sequence[Condition]
) -> list[dict[str, Any]]:
    """Return the rows of the images that `choose_numbers` chooses."""
    return images.rows_at(choose_numbers(images, count, seed, where))


def choose_numbers(
    images: Images, count: int, seed: int | None, where: Sequence[Condition]
) -> list[int]:
    """Return the numbers of at most `count` images that match all conditions, in order.

    Args:
        images: of an output.
        count: the largest number of images.
        seed: of a random choice; None: the first images.
        where: conditions on columns of the images or of scores.parquet.
    """
    matching = _matching_numbers(images, where) if where else iter(range(len(images)))
    if seed is None:
        return list(itertools.islice(matching, count))
    numbers = list(matching) if where else range(len(images))
    return sorted(random.Random(seed).sample(numbers, min(count, len(numbers))))


def _matching_numbers(images: Images, where: Sequence[Condition]) -> Iterator[int]:
    """Yield the numbers of the images that match all conditions, in order."""
    columns = {condition.column for condition in where}
    scores = read_scores(images.store) if columns & set(SCORE_COLUMNS) else {}
    _check_columns(columns, next(images.rows()), bool(scores), images.store.url)
    no_scores = dict.fromkeys(SCORE_COLUMNS)
    for number, row in enumerate(images.rows(["sha256", *columns])):
        row = {**scores.get(row["sha256"], no_scores), **row}
        if all(condition.matches(row) for condition in where):
            yield number


def _check_columns(columns: set[str], row: dict[str, Any], scored: bool, output: str) -> None:
    """Raise an SdbatchError if a column is unknown, or is a score of an output without scores."""
    own = [name for name in row if name != "image"]
    for name in sorted(columns.difference(own)):
        if name not in SCORE_COLUMNS:
            known = [*own, *SCORE_COLUMNS]
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean {close[0]!r}?" if close else f"Columns: {', '.join(known)}."
            raise SdbatchError(f"--where = {name!r}: not a column of the output. {hint}")
        if not scored:
            raise SdbatchError(
                f"--where = {name!r}: the output has no scores yet. Run `sdbatch score {output}` "
                f"first."
            )

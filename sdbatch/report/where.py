"""Which images of an output to look at: the first, a random set, those of a condition."""

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
from sdbatch.report import scores

# Columns of the table's own may have spaces in their names. `==` is none of the comparisons.
_CONDITION = re.compile(r"\s*([^\s<>=!~][^<>=!~]*?)\s*(<=|>=|!=|=|<|>|~)(?!=)\s*(.*?)\s*")
_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "!=": operator.ne,
    "=": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
    "~": lambda value, part: str(part).lower() in str(value).lower(),
}
_WORDS = {"true": True, "false": False}


@dataclass(frozen=True, slots=True)
class Condition:
    """One `column operator value` that a row must fulfil; null fulfils only `!=`."""

    column: str
    compare: str
    value: str

    def holds(self, row: dict[str, Any]) -> bool:
        """Say whether `row` fulfils it; an SdbatchError if the two values are not of a kind."""
        value = row[self.column]
        if value is None:
            return self.compare == "!="
        return _COMPARE[self.compare](value, self._like(value))

    def _like(self, value: Any) -> Any:
        """Return the condition's value in the kind of a column's `value`."""
        if self.compare == "~" or isinstance(value, str):
            return self.value
        if isinstance(value, bool) and self.value.lower() in _WORDS:
            return _WORDS[self.value.lower()]
        if isinstance(value, int | float) and not isinstance(value, bool):
            for kind in (int, float):  # a float has not room for all digits of a seed
                with contextlib.suppress(ValueError):
                    return kind(self.value)
        raise SdbatchError(
            f"--where {self.column}{self.compare}{self.value} = compared with {value!r}: must be a "
            f"value of the same kind. `~` looks for a part of its text."
        )


def condition(text: str) -> Condition:
    """Read a condition such as `guidance_scale>=5`, `sampler=ddim` or `prompt~cat`."""
    match = _CONDITION.fullmatch(text)
    if match is None:
        raise SdbatchError(
            f"--where {text!r}: must be a column, one of {' '.join(_COMPARE)}, and a value. Such "
            f"as guidance_scale>=5 or prompt~cat."
        )
    return Condition(*match.groups())


def choose(
    images: Images, count: int, seed: int | None, where: Sequence[Condition]
) -> list[dict[str, Any]]:
    """Return the rows of at most `count` images that fulfil all conditions, in order.

    Args:
        images: of an output.
        count: at most so many; the first ones of the output, unless there is a seed.
        seed: of a random choice.
        where: conditions on columns of the images or of scores.parquet.
    """
    fitting = _fitting(images, where) if where else iter(range(len(images)))
    if seed is None:
        return images.at(itertools.islice(fitting, count))
    every = list(fitting) if where else range(len(images))
    return images.at(random.Random(seed).sample(every, min(count, len(every))))


def _fitting(images: Images, where: Sequence[Condition]) -> Iterator[int]:
    """Yield the numbers of the images that fulfil all conditions, in order."""
    names = {condition.column for condition in where}
    known = scores.read(images.store) if names & set(scores.COLUMNS) else {}
    _refuse_unknown(names, next(images.rows()), bool(known), images.store.url)
    unscored = dict.fromkeys(scores.COLUMNS)
    for number, row in enumerate(images.rows(["sha256", *names])):
        row = {**known.get(row["sha256"], unscored), **row}
        if all(condition.holds(row) for condition in where):
            yield number


def _refuse_unknown(names: set[str], row: dict[str, Any], scored: bool, output: str) -> None:
    own = [name for name in row if name != "image"]
    for name in sorted(names.difference(own)):
        if name not in scores.COLUMNS:
            known = [*own, *scores.COLUMNS]
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean {close[0]!r}?" if close else f"There are: {', '.join(known)}."
            raise SdbatchError(
                f"--where {name} = no such column: must be one of the images'. {hint}"
            )
        if not scored:
            raise SdbatchError(
                f"--where {name} = no scores yet: must be scored first. Run `sdbatch score "
                f"{output}`."
            )

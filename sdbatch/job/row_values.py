"""What a row in the job file, or in a job from Python, may hold."""

from collections.abc import Iterable
from datetime import date, time
from pathlib import PurePath
from typing import Any

from sdbatch.errors import short_repr


def check_row_value(where: str, value: Any) -> None:
    """Raise a ValueError for what neither the job file nor the output's record of it can hold."""
    inside: Iterable[Any] = ()
    if isinstance(value, dict | list | tuple):
        inside = value.values() if isinstance(value, dict) else value
    elif not isinstance(value, str | int | float | date | time | PurePath | None):
        raise ValueError(
            f"{where} = {short_repr(value)}: must be text, a number, true, false or null, or lists "
            f"and mappings of these. Of a picture give the path, the URL or a data URI"
        )
    for each in inside:
        check_row_value(where, each)

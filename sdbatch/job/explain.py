"""What pydantic found wrong with a job or a row, in one line for the person who wrote it."""

import difflib
import reprlib
from collections.abc import Sequence
from typing import Any, get_args

from pydantic import ValidationError

from sdbatch.job.sections import Job
from sdbatch.section import Section


def explain(error: ValidationError) -> str:
    """Say the first thing that is wrong in one line: where, what was found, what it must be."""
    first, *others = _to_the_point(error)
    where = _where(first)
    if first["type"] == "extra_forbidden":
        parents, key = _keys(first["loc"][:-1]), str(first["loc"][-1])
        return f"{'.'.join([*parents, key])}: unknown key. {_suggest(parents, key)}"
    if first["type"] == "missing":
        return f"{where} = nothing: must be given."
    if first["type"] == "value_error" and " = " in first["msg"]:
        inside = f"{where}." if where else ""
        return f"{inside}{first['msg'].removeprefix('Value error, ')}."
    musts = [_must(first), *(_must(other) for other in others if _where(other) == where)]
    return f"{where} = {reprlib.repr(first['input'])}: must be {' or '.join(dict.fromkeys(musts))}."


def _to_the_point(error: ValidationError) -> list[Any]:
    """Return the errors; of a section given where a word would do too, only what is wrong in it."""
    found = error.errors()
    words = ("literal_error", "int_type")
    return [
        each for each in found if each["type"] not in words or not isinstance(each["input"], dict)
    ] or found


def _suggest(parents: list[str], key: str) -> str:
    section: Any = Job
    for parent in parents:
        if not parent.isdigit():  # the place in a list
            section = _section(section.model_fields[parent].annotation)
    known = list(section.model_fields)
    close = difflib.get_close_matches(key, known, n=1)
    if close:
        return f"Did you mean {'.'.join([*parents, close[0]])!r}?"
    return f"Known: {', '.join(known)}."


def _section(annotation: Any) -> Any:
    """Return the section that a key holds, also where it is one of several kinds or in a list."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next(filter(None, map(_section, get_args(annotation))), None)


def _where(error: Any) -> str:
    """Return the dotted key, without the names that pydantic adds for a union's branches."""
    return ".".join(_keys(error["loc"]))


def _keys(loc: Sequence[Any]) -> list[str]:
    branches = ("[key]", "str", "int", "bool", "constrained-int")
    kinds = ("literal[", "list[", "dict[", "function-after[")
    parts = [str(part) for part in loc if part not in branches]
    return [part for part in parts if not part.startswith(kinds)]


def _must(error: Any) -> str:
    plain = {
        "model_type": "a section of keys",
        "dict_type": "a section of keys",
        "string_type": "text",
        "int_type": "a whole number",
        "float_type": "a number",
        "bool_type": "true or false",
        "finite_number": "a number",
        "list_type": "a list",
        "too_short": "not empty",
    }
    message = str(error["msg"]).removeprefix("Value error, ").removeprefix("must be ")
    return plain.get(error["type"], message.removeprefix("Input should be "))

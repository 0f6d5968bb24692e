"""Pydantic's error about a job or a row as one line for the person who wrote it."""

import difflib
import re
from collections.abc import Sequence
from typing import Any, get_args

from pydantic import ValidationError

from sdbatch.errors import short_repr
from sdbatch.job.sections import Job
from sdbatch.section import Section

_LONGEST_KEY = 100  # characters of an unknown key that are shown and compared


def describe_error(error: ValidationError) -> str:
    """Describe the first error in one line: the key, its value, what the value must be."""
    return describe_key(errors_by_key(error)[0])


def errors_by_key(error: ValidationError) -> list[list[Any]]:
    """Return the errors of each key: one, or one for each type that its value may have."""
    groups: dict[str, list[Any]] = {}
    for each in _relevant_errors(error):
        groups.setdefault(_dotted_key(each), []).append(each)
    return list(groups.values())


def describe_key(errors: Sequence[Any]) -> str:
    """Describe the errors of one key in one line: the key, its value, what it must be."""
    first = errors[0]
    where = _dotted_key(first)
    if first["type"] == "extra_forbidden":
        parents, key = _keys(first["loc"][:-1]), str(first["loc"][-1])[:_LONGEST_KEY]
        return f"{'.'.join([*parents, key])}: unknown key. {_suggest(parents, key)}"
    if first["type"] == "literal_error" and first["loc"][-1] == "[key]":  # of a mapping
        key, known = str(first["input"])[:_LONGEST_KEY], re.findall("'(.+?)'", first["msg"])
        return f"{where}: unknown key. {_nearest(_keys(first['loc'])[:-1], key, known)}"
    if first["type"] == "missing":
        return f"{where} = nothing: must be given."
    if first["type"] == "value_error" and " = " in first["msg"]:
        parent = f"{where}." if where else ""
        return f"{parent}{first['msg'].removeprefix('Value error, ')}."
    allowed = dict.fromkeys(_allowed(each) for each in errors)
    return f"{where} = {short_repr(first['input'])}: must be {' or '.join(allowed)}."


def _relevant_errors(error: ValidationError) -> list[Any]:
    """Return the errors; for a mapping or a list, without those that expect a word or a number."""
    errors = error.errors()
    scalars = ("literal_error", "int_type")
    return [
        each
        for each in errors
        if each["type"] not in scalars or not isinstance(each["input"], dict | list)
    ] or errors


def _suggest(parents: list[str], key: str) -> str:
    section: Any = Job
    for parent in parents:
        if not parent.isdigit():  # the place in a list
            section = _section_of(section.model_fields[parent].annotation)
    return _nearest(parents, key, list(section.model_fields))


def _nearest(parents: list[str], key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    if close:
        return f"Did you mean {'.'.join([*parents, close[0]])!r}?"
    return f"Known: {', '.join(known)}."


def _section_of(annotation: Any) -> Any:
    """Return the section that a key holds, also where it is one of several types or in a list."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next(filter(None, map(_section_of, get_args(annotation))), None)


def _dotted_key(error: Any) -> str:
    """Return the key of an error, without the names that pydantic adds for a union's branches."""
    return ".".join(_keys(error["loc"]))


def _keys(loc: Sequence[Any]) -> list[str]:
    branches = ("[key]", "str", "int", "bool", "constrained-int")
    kinds = ("literal[", "list[", "dict[", "function-after[")
    parts = [str(part) for part in loc if part not in branches]
    return [part for part in parts if not part.startswith(kinds)]


def _allowed(error: Any) -> str:
    """Return what the value must be."""
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

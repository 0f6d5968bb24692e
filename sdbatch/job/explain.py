"""What pydantic found wrong with a job or a row, in one line for the person who wrote it."""

import difflib
import reprlib
from typing import Any, get_args

from pydantic import ValidationError

from sdbatch.job.sections import Job


def explain(error: ValidationError) -> str:
    """Say the first thing that is wrong in one line: where, what was found, what it must be."""
    first, *others = error.errors()
    where = _where(first)
    if first["type"] == "extra_forbidden":
        *parents, key = (str(part) for part in first["loc"])
        return f"{'.'.join([*parents, key])}: unknown key. {_suggest(parents, key)}"
    if first["type"] == "missing":
        return f"{where} = nothing: must be given."
    if first["type"] == "value_error" and " = " in first["msg"]:
        inside = f"{where}." if where else ""
        return f"{inside}{first['msg'].removeprefix('Value error, ')}."
    musts = [_must(first), *(_must(other) for other in others if _where(other) == where)]
    return f"{where} = {reprlib.repr(first['input'])}: must be {' or '.join(dict.fromkeys(musts))}."


def _suggest(parents: list[str], key: str) -> str:
    section: Any = Job
    for parent in parents:
        inner = get_args(section)  # of a list
        section = inner[0] if inner else section.model_fields[parent].annotation
    known = list(section.model_fields)
    close = difflib.get_close_matches(key, known, n=1)
    if close:
        return f"Did you mean {'.'.join([*parents, close[0]])!r}?"
    return f"Known: {', '.join(known)}."


def _where(error: Any) -> str:
    """Return the dotted key, without the names that pydantic adds for a union's branches."""
    branches = ("[key]", "str", "int", "bool", "constrained-int", "list[str]")
    parts = [str(part) for part in error["loc"] if part not in branches]
    return ".".join(part for part in parts if "literal[" not in part)


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
        "too_short": "a list that is not empty",
    }
    message = str(error["msg"]).removeprefix("Value error, ").removeprefix("must be ")
    return plain.get(error["type"], message.removeprefix("Input should be "))

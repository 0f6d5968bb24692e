"""JSON: documents, of which the rows are found wherever they are, and JSON Lines."""

import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from sdbatch.errors import PromptTableError, short_repr
from sdbatch.job import Reader
from sdbatch.prompts.rows import FAULT, Row, check_surrogates, to_row

if TYPE_CHECKING:
    from sdbatch.prompts.text import Text

_PROMPT = re.compile(r"prompts?|captions?|text|sentence", re.IGNORECASE)
_SURROGATE = re.compile(r"\\u[dD]")  # how JSON writes half a surrogate pair
_SHOWN = 8  # of the places where rows may be


def parse_lines(text: "Text", _: Reader) -> Iterator[Row]:
    """Yield the rows of JSON Lines; a line that is no JSON is a row that fails."""
    for number, line in enumerate(text, start=1):
        if not line.strip():
            continue
        where = f"line {number}"
        try:
            row = to_row(json.loads(line), where)
        except (json.JSONDecodeError, RecursionError) as error:
            row = {FAULT: f"{where} = {error}: must be JSON"}
        yield check_surrogates(row, where) if _SURROGATE.search(line) else row


def parse_document(text: "Text", reader: Reader) -> Iterator[Row]:
    """Yield the rows of a JSON document."""
    url, content = text.url, text.read()
    try:
        value = json.loads(content)
    except (json.JSONDecodeError, RecursionError) as error:
        raise PromptTableError(f"{url} = {error}: must be valid JSON.") from error
    if reader.field is not None:
        value = _value_at(value, reader.field, url)
    surrogates = _SURROGATE.search(content) is not None
    for number, element in enumerate(_elements(value, url)):
        where = f"element {number}"
        row = to_row(element, where)
        yield check_surrogates(row, where) if surrogates else row


def _value_at(document: Any, field: str, url: str) -> Any:
    value = document
    for key in field.split("."):
        if not isinstance(value, dict) or key not in value:
            raise PromptTableError(
                f"{url} = no {field!r}: prompts.reader.field must be where its rows are. "
                f"{_describe(document)}"
            )
        value = value[key]
    return value


def _elements(value: Any, url: str) -> list[Any]:
    """Return the rows of a document: a list, or what an object without doubt holds as such."""
    if isinstance(value, list):
        return value
    rows = _rows_of(value) if isinstance(value, dict) else None
    if rows is None:
        raise PromptTableError(
            f"{url} = {_kind(value)}: must be a list of objects or of strings, or say where such "
            f"a list is. {_describe(value)}"
        )
    return rows


def _rows_of(value: dict[str, Any]) -> list[Any] | None:
    """Return the rows of an object; None: none, or it is not clear which they are."""
    if set(value) == {"columns", "index", "data"}:  # pandas' orient="split"
        return [dict(zip(value["columns"], row, strict=True)) for row in value["data"]]
    for read in (_columns, _single_list, _by_id, _single_row):
        if (rows := read(value)) is not None:
            return rows
    return None


def _columns(value: dict[str, Any]) -> list[Any] | None:
    """Return the rows of columns: lists of one length, or what pandas' orient="columns" writes."""
    columns = [*value.values()]
    if len(columns) < 2 or not any(map(_PROMPT.fullmatch, value)):
        return None
    if all(isinstance(column, dict) for column in columns):
        keys = [*columns[0]]
        if any([*column] != keys for column in columns) or any(map(_PROMPT.fullmatch, keys)):
            return None
        columns = [[*column.values()] for column in columns]
    if not all(isinstance(column, list) for column in columns):
        return None
    nested = any(isinstance(each, dict) for column in columns for each in column)
    if nested or len({len(column) for column in columns}) != 1:
        return None
    return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]


def _single_list(value: dict[str, Any]) -> list[Any] | None:
    """Return the only list of rows; of several, the only one with prompts in it."""
    lists = {key: each for key, each in value.items() if _is_list_of_rows(each)}
    if len(lists) > 1:
        lists = {key: each for key, each in lists.items() if _has_prompts(key, each)}
    if len(lists) != 1 or (len(value) > 1 and _single_row(value)):
        return None
    return [*next(iter(lists.values()))]


def _by_id(value: dict[str, Any]) -> list[Any] | None:
    """Return the rows of objects or texts by their ids."""
    if not value or any(map(_PROMPT.fullmatch, value)):
        return None
    if all(isinstance(each, str) for each in value.values()):
        return [{"id": key, "prompt": text} for key, text in value.items()]
    if not all(isinstance(each, dict) for each in value.values()):
        return None
    if not any(_PROMPT.fullmatch(name) for name in next(iter(value.values()))):
        places = _places(value)
        if places:
            return None  # the rows are deeper
    return [{"id": key, **each} for key, each in value.items()]


def _single_row(value: dict[str, Any]) -> list[Any] | None:
    """Return the row that the object is: the only line of JSON Lines."""
    prompts = (each for name, each in value.items() if _PROMPT.fullmatch(name))
    return [value] if any(isinstance(each, str) for each in prompts) else None


def _is_list_of_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict | str)


def _has_prompts(key: str, rows: list[Any]) -> bool:
    if isinstance(rows[0], str):
        return _PROMPT.fullmatch(key) is not None
    return any(map(_PROMPT.fullmatch, rows[0]))


def _kind(value: Any) -> str:
    if isinstance(value, dict):
        keys = ", ".join(map(short_repr, [*value][:_SHOWN]))
        return f"an object of {len(value):,} keys ({keys}{', ...' * (len(value) > _SHOWN)})"
    return short_repr(value)


def _describe(document: Any) -> str:
    """Return the way out: the places of a document where rows may be."""
    places = _places(document)
    if not places:
        return "Write an object per line, JSONL."
    return f"Name it: --set prompts.reader.field={' or '.join(places[:_SHOWN])}"


def _places(value: Any, where: str = "", depth: int = 3) -> list[str]:
    """Return the dotted paths of lists of rows in a document."""
    if not isinstance(value, dict) or not depth:
        return []
    places: list[str] = []
    for key, each in value.items():
        path = f"{where}.{key}".lstrip(".")
        places += [path] if _is_list_of_rows(each) else _places(each, path, depth - 1)
        if len(places) > _SHOWN:
            break
    return places

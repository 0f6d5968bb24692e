"""CSV and TSV: the separator and the quoting as the file has them, and its rows.

Every value is text; an empty cell is null. A line whose cells are all empty is no row.
"""

import csv
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal

from sdbatch.errors import PromptTableError
from sdbatch.job import Reader
from sdbatch.prompts.rows import Row

if TYPE_CHECKING:
    from sdbatch.prompts.text import Text

_SEPARATORS = (",", ";", "\t", "|")
_NO_SEPARATOR = "\x1f"  # of a file with one column: a character that no text has
_SAMPLE = 20  # lines that must agree in the number of fields
_EXCEL_HINT = re.compile(r'"?sep=(.)"?\r?\n', re.IGNORECASE)  # the first line, for Excel alone


def parse_csv(text: "Text", reader: Reader) -> Iterator[Row]:
    """Yield the rows of a CSV file."""
    return _parse(text, reader, _SEPARATORS, ("\t",))


def parse_tsv(text: "Text", reader: Reader) -> Iterator[Row]:
    """Yield the rows of a TSV file.

    IANA's text/tab-separated-values has no quoting: then quotes are part of the prompt. pandas and
    Excel do quote.
    """
    return _parse(text, reader, ("\t", ",", ";", "|"), ("\t", _NO_SEPARATOR))


def _parse(
    text: "Text", reader: Reader, separators: Iterable[str], unquoted: Iterable[str]
) -> Iterator[Row]:
    """Yield rows; with a separator in `unquoted`, a file may have no quoting."""
    hint = _EXCEL_HINT.match(text.head)
    separator = reader.separator or (hint[1] if hint else None)
    if separator is None:
        columns = len(reader.names) if reader.names else None
        separator = _find_separator(text.head, separators, columns)
    quoted = reader.quotes
    if quoted is None:
        quoted = separator not in unquoted or _was_quoted(text, separator)
    lines = iter(text)
    if hint:
        next(lines)
    records = csv.reader(lines, strict=True, delimiter=separator, quoting=_quoting(quoted))
    try:
        header = reader.names or next(filter(any, records), [])
        yield from _rows(text.url, records, header)
    except csv.Error as error:
        raise PromptTableError(
            f"{text.url} line {records.line_num} = {error}: must be valid CSV, with at most "
            f"{csv.field_size_limit():,} characters in a field. Use JSONL for longer text."
        ) from error


def _quoting(quoted: bool) -> Literal[0, 3]:
    return csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE


def _rows(url: str, records: Any, header: list[str]) -> Iterator[Row]:
    """Yield a row for each record, whose fields are the columns of `header`."""
    names = header
    while len(names) > 1 and not names[-1]:  # Excel's empty columns at the end
        names = names[:-1]
    if len(set(names)) != len(names):
        repeated = next(name for name in names if names.count(name) > 1)
        raise PromptTableError(f"{url} = column {repeated!r} appears twice: rename one of them.")
    for values in records:
        if not values or (len(values) > 1 and not any(values)):
            continue  # a blank line, or Excel's
        if len(values) != len(header):
            raise PromptTableError(
                f"{url} line {records.line_num} = {len(values)} fields: must be {len(header)}, "
                f"as in the header. Quote a field that holds a separator."
            )
        if any(values[len(names) :]):
            raise PromptTableError(
                f"{url} line {records.line_num} = a value in a column without a name: must have "
                f"one. Name all columns in the header."
            )
        yield {name: value or None for name, value in zip(names, values, strict=False)}


def _find_separator(head: str, separators: Iterable[str], columns: int | None) -> str:
    """Return the separator by which the first lines agree with the header, or have `columns`.

    The header alone decides where no separator makes them agree: the line that does not is at
    fault. A header in one piece is that of a file with one column.
    """
    lines = [line for line in re.split(r"(?<=\n)", head) if line.strip()]
    widest = 1
    found = first = None
    for separator in separators:
        widths = _widths(lines, separator)
        if not widths or widths[0] == 1 or (columns and columns != widths[0]):
            continue
        first = first or separator
        if len({*widths}) == 1 and widths[0] > widest:
            found, widest = separator, widths[0]
    return found or first or _NO_SEPARATOR


def _widths(lines: list[str], separator: str) -> list[int]:
    """Return the number of fields of each of the first records; empty: no valid CSV."""
    quoting = _quoting(separator != "\t")
    widths = []
    try:
        for record in csv.reader(lines, delimiter=separator, quoting=quoting):
            widths.append(len(record))
            if len(widths) > _SAMPLE:
                break
    except csv.Error:
        return widths[:1]
    return widths[:-1] if len(widths) > 2 else widths  # the head may cut the last


def _was_quoted(text: "Text", separator: str) -> bool:
    """Return whether a file was written with quotes around the fields that need them.

    One quote where such a writer would have doubled it, or a line with another number of fields,
    says no. Yes says a field with a doubled quote, a separator or a line break in it, a header all
    in quotes, or quotes exactly where a comma is, which is how Excel writes.
    """
    evidence = False
    kinds = set()  # (quoted, with a comma) of the fields
    with text.reopened() as again:
        raw: list[str] = []
        records = csv.reader(_kept(again, raw), strict=True, delimiter=separator)
        width = 0
        try:
            for values in records:
                if '"' in "".join(raw) or not width:
                    fields = _quoted_fields("".join(raw), values)
                    if fields is None:
                        return False
                    evidence = evidence or (not width and all(fields))
                    for value, quoted in zip(values, fields, strict=True):
                        needed = any(each in value for each in ('"', separator, "\n", "\r"))
                        evidence = evidence or (quoted and needed)
                        kinds.add((quoted, "," in value))
                elif "," in "".join(raw):
                    kinds.add((False, True))
                width = width or len(values)
                if values and len(values) != width:
                    return False
                raw.clear()
        except csv.Error:
            return False
    excel = (True, True) in kinds and not {(True, False), (False, True)} & kinds
    return evidence or excel


def _kept(lines: Iterable[str], raw: list[str]) -> Iterator[str]:
    for line in lines:
        raw.append(line)
        yield line


def _quoted_fields(raw: str, values: list[str]) -> list[bool] | None:
    """Return which fields of a record were quoted; None: no writer that quotes wrote it."""
    place, fields = 0, []
    for value in values:
        doubled = '"{}"'.format(value.replace('"', '""'))
        if raw.startswith(doubled, place):
            fields.append(True)
            place += len(doubled) + 1
        elif '"' in value:
            return None
        else:
            fields.append(False)
            place += len(value) + 1
    return fields

"""From rows of the prompt table to requests for the engine: one request an image, all resolved.

A row that cannot be drawn stays, with its values and the reason in `error`. The images of row r
are r's copies 0 .. images_per_row - 1, each a sequence of `frames` images if the job says so;
image i of a file belongs to its row i // row_images.
"""

import decimal
import hashlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import ValidationError

from sdbatch import schema
from sdbatch.errors import short_repr
from sdbatch.job import Job, Sampling, describe_error
from sdbatch.prompt_syntax import write_loras
from sdbatch.prompts import captions
from sdbatch.prompts.extras import to_output
from sdbatch.prompts.rows import FAULT
from sdbatch.prompts.sizes import SIDES
from sdbatch.prompts.types import JSON_TEXT, cells_of
from sdbatch.sampling import MAX_SEED, check_seed

_MANTISSA = {"double": 53, "float": 24, "halffloat": 11}  # bits of a float's whole numbers
_MOST_KNOWN = 1_000  # rows with different values that are remembered
# Called with the request of each prompt's first copy and the index of its row.
AddPictures: TypeAlias = Callable[[list[dict[str, Any]], NDArray[np.int64]], None]


def row_seed(seed: int, row_key: str) -> int:
    """Return the seed in [0, 2**32) of a row without a seed of its own.

    Not more bits: torch's CPU generator (mt19937) ignores all but 32, so two different seeds could
    draw the same noise. The row's copies count up from this seed, so that each has another one.
    """
    text = f"{seed}\n{row_key}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "little")


def resolve_requests(
    rows: pa.Table,
    shard: schema.Shard,
    job: Job,
    columns: dict[str, str],
    extras: pa.Schema,
    add_pictures: AddPictures | None = None,
) -> pa.Table:
    """Return the requests of a shard, one row an image, with the columns of schema.requests.

    Args:
        rows: the rows `shard.rows(row_images)` of the shard's file.
        shard: the file and its range of images.
        job: its values apply where the table has none.
        columns: our name -> the table's name.
        extras: the table's own columns that go into the output.
        add_pictures: adds the rows' pictures to their requests.
    """
    row_images = job.prompts.row_images
    start, _ = shard.rows(row_images)
    resolved, row_of = resolve_rows(rows, shard.first_row, job, columns, start)
    if add_pictures is not None:
        add_pictures(resolved, row_of)
    images = range(shard.first_image, shard.first_image + shard.images)
    requests = [
        {
            **_copy(resolved[image // row_images - start], image % row_images, job.prompts.frames),
            "key": schema.key(shard.shard, index),
        }
        for index, image in enumerate(images)
    ]
    table = pa.Table.from_pylist(requests, schema=schema.requests(pa.schema([])))
    row_of_image = pa.array(row_of[np.asarray(images) // row_images - start])
    for field in extras:
        own = to_output(rows[field.name], field.type)
        table = table.append_column(field, own.take(row_of_image))
    return table


def resolve_rows(
    rows: pa.Table,
    first_row: int,
    job: Job,
    columns: dict[str, str],
    start: int = 0,
    known: "Known | None" = None,
) -> tuple[list[dict[str, Any]], NDArray[np.int64]]:
    """Return the request of each prompt's first copy, and the index of its row in `rows`.

    `error` is None in those that can be drawn.

    Args:
        rows: of one file.
        first_row: the number in the table of the file's first row.
        job: its values apply where the table has none.
        columns: our name -> the table's name.
        start: the number in the file of the first of `rows`.
        known: the values of earlier rows of the same table.
    """
    prompts = captions.prompts_of(rows, columns["prompt"])
    if rows.schema.field(columns["prompt"]).metadata == JSON_TEXT:
        prompts = replace(prompts, texts=cells_of(rows, columns["prompt"]))
    names = [name for name in Sampling.model_fields if name in columns]
    cells = [cells_of(rows, columns[name]) for name in names]
    by_row = zip(*cells, strict=True) if cells else itertools.repeat((), len(rows))
    values = [*map(partial(_resolve_values, known or Known(job), names), by_row)]
    start = start if prompts.first_row is None else prompts.first_row
    numbers = range(first_row + start, first_row + start + len(rows))
    keys: list[str | ValueError | None] = [*map(str, numbers)]
    if "id" in columns:
        keys = [*map(partial(_row_key, rows[columns["id"]].type), cells_of(rows, columns["id"]))]
    faults = rows[FAULT].to_pylist() if FAULT in rows.column_names else None
    resolved = []
    for index, (text, row) in enumerate(zip(prompts.texts, prompts.rows.tolist(), strict=True)):
        element = None if prompts.elements is None else int(prompts.elements[index])
        request = _resolve_row(text, keys[row], element, values[row], job)
        if faults and faults[row] is not None:  # of the file: the rest follows from it
            request["error"] = faults[row]
        resolved.append(request)
    return resolved, prompts.rows


def _row_key(kind: pa.DataType, cell: Any) -> str | ValueError | None:
    """Return the key of a row from its id; None: the row has none; an error: it is not exact.

    10, 10.0 and the decimal 10.00 are the same key: a column of whole numbers becomes floats when
    a cell is empty.
    """
    if cell is None or cell == "" or cell != cell:  # NaN is pandas' null
        return None
    if isinstance(cell, decimal.Decimal):
        text = f"{cell:f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    if not isinstance(cell, float):
        return str(cell)
    digits = _MANTISSA[str(kind.value_type if pa.types.is_dictionary(kind) else kind)]
    if abs(cell) > 2**digits:
        return ValueError(
            f"id = {cell!r}: must be text or a whole number, as a float is not exact above "
            f"2**{digits}"
        )
    return str(int(cell)) if cell.is_integer() else str(cell)


def _resolve_row(
    prompt: Any,
    key: str | ValueError | None,
    element: int | None,
    resolved: "_Values",
    job: Job,
) -> dict[str, Any]:
    """Return the request of a prompt's first copy; `error` is None if it can be drawn."""
    errors = []
    if key is None:
        errors.append("id = null: must be set")
    elif isinstance(key, ValueError):
        errors.append(str(key))
        key = None
    elif element is not None:
        key = f"{key}-{element}"
    if prompt is None:
        errors.append("prompt = null: must be text; an empty prompt is allowed")
    elif not isinstance(prompt, str):
        errors.append(f"prompt = {short_repr(prompt)}: must be text")
        prompt = None
    values = resolved.values
    if not resolved.has_seed:
        values = {**values, "seed": row_seed(job.sampling.seed, key or "")}
    if resolved.error is not None:
        errors.append(resolved.error)
    elif resolved.has_seed:
        try:
            check_seed(values["seed"], job.prompts.images_per_row)
        except ValueError as error:
            errors.append(str(error))
    return {
        **values,
        "prompt": prompt,
        "row_key": key,
        "has_size": resolved.has_size,
        "error": "; ".join(errors) or None,
    }


@dataclass(frozen=True, slots=True)
class _Values:
    """The values of the sampling keys in a row."""

    values: dict[str, Any]
    has_seed: bool  # False: the seed follows from the row's key
    has_size: bool  # the row sets a side of its image
    error: str | None


class Known:
    """The job's values, and the rows' that were validated: most tables repeat them."""

    def __init__(self, job: Job) -> None:
        self.defaults = job.sampling.model_dump()
        self.loras = job.model.row_loras
        self.validated: dict[str, _Values] = {}


def _resolve_values(known: Known, names: list[str], row: tuple[Any, ...]) -> _Values:
    """Return the values of a row from its cells, which belong to the keys `names`."""
    cells = {
        name: cell
        for name, cell in zip(names, row, strict=True)
        if cell is not None and not _is_empty(name, cell)
    }
    seed = cells.pop("seed", None)
    if seed is not None and not (type(seed) is int and 0 <= seed <= MAX_SEED):
        return _validate(known, {**cells, "seed": seed}, has_seed=True)
    cell_text = repr(cells)  # 0.0 and -0.0 are equal, and not the same value
    found = known.validated.get(cell_text)
    if found is None:
        found = _validate(known, cells, has_seed=False)
        if len(known.validated) < _MOST_KNOWN:
            known.validated[cell_text] = found
    if seed is None:
        return found
    return replace(found, values={**found.values, "seed": seed}, has_seed=True)


def _validate(known: Known, cells: dict[str, Any], *, has_seed: bool) -> _Values:
    values = {**known.defaults, **cells}
    has_size = not cells.keys().isdisjoint(SIDES)
    try:
        values = Sampling.model_validate(values, strict=False).model_dump()
        values["loras"] = write_loras(values["loras"], known.loras)
    except ValidationError as error:
        values = {
            field.name: _cast_or_none(values[field.name], field.type)
            for field in schema.SAMPLING[1:]
        }
        return _Values(values, has_seed, has_size, describe_error(error).rstrip("."))
    except ValueError as error:  # a name that the job does not declare
        return _Values(values, has_seed, has_size, str(error))
    return _Values(values, has_seed, has_size, None)


def _is_empty(name: str, value: Any) -> bool:
    """Return whether a text table's cell sets nothing; no negative prompt, no LoRA are values."""
    return value == "" and name not in ("negative_prompt", "loras")


def _copy(row: dict[str, Any], sample_index: int, frames: int | None) -> dict[str, Any]:
    """Return the request of a row's image; the images of a sequence have one seed."""
    copy, frame = divmod(sample_index, frames or 1)
    seed = row["seed"]
    if seed is not None and seed + copy <= MAX_SEED:
        seed += copy
    mix = row["mix"] if frames is None else frame / (frames - 1)
    return {**row, "seed": seed, "sample_index": sample_index, "mix": mix}


def _cast_or_none(value: Any, arrow_type: pa.DataType) -> Any:
    """Return the value if the output's column can hold it, else None; `error` names it anyway."""
    try:
        return pa.scalar(value).cast(arrow_type).as_py()
    except (pa.ArrowException, OverflowError):
        return None

"""From rows of the prompt table to requests for the engine: one request an image, all resolved.

A row that cannot be drawn stays, with its values and the reason in `error`. The images of row r
are r's copies 0 .. images_per_row - 1; image i of a file belongs to its row i // images_per_row.
"""

import hashlib
import json
from typing import Any

import pyarrow as pa
from pydantic import ValidationError

from sdbatch import schema
from sdbatch.errors import short_repr
from sdbatch.job import COLUMNS, Job, Sampling, describe_error
from sdbatch.prompt_syntax import write_loras
from sdbatch.prompts.rows import FAULT
from sdbatch.prompts.types import JSON_TEXT
from sdbatch.sampling import MAX_SEED, check_seed


def row_seed(seed: int, row_key: str) -> int:
    """Return the seed in [0, 2**32) of a row without a seed of its own.

    Not more bits: torch's CPU generator (mt19937) ignores all but 32, so two different seeds could
    draw the same noise. The row's copies count up from this seed, so that each has another one.
    """
    text = f"{seed}\n{row_key}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "little")


def resolve_requests(
    rows: pa.Table, shard: schema.Shard, job: Job, columns: dict[str, str], extras: pa.Schema
) -> pa.Table:
    """Return the requests of a shard, one row an image, with the columns of schema.requests.

    Args:
        rows: the rows `shard.rows(images_per_row)` of the shard's file.
        shard: the file and its range of images.
        job: its values apply where the table has none.
        columns: our name -> the table's name.
        extras: the table's own columns that go into the output.
    """
    copies = job.prompts.images_per_row
    start, _ = shard.rows(copies)
    used = [name for name in COLUMNS if name in columns]
    values = {name: _cells(rows, columns[name]) for name in used}
    if FAULT in rows.column_names:
        values[FAULT] = rows[FAULT].to_pylist()
    resolved = []
    for index in range(rows.num_rows):
        row = {name: column[index] for name, column in values.items()}
        resolved.append(_resolve_row(row, shard.first_row + start + index, job))
    images = range(shard.first_image, shard.first_image + shard.images)
    requests = [
        {
            **_copy(resolved[image // copies - start], image % copies),
            "key": schema.key(shard.shard, index),
        }
        for index, image in enumerate(images)
    ]
    table = pa.Table.from_pylist(requests, schema=schema.requests(pa.schema([])))
    row_of_image = pa.array([image // copies - start for image in images], pa.int64())
    for field in extras:
        table = table.append_column(field, rows[field.name].take(row_of_image))
    return table


def _cells(rows: pa.Table, name: str) -> list[Any]:
    """Return the values of a column; those of mixed types are stored as JSON text."""
    cells: list[Any] = rows[name].to_pylist()
    if rows.schema.field(name).metadata == JSON_TEXT:
        return [None if cell is None else json.loads(cell) for cell in cells]
    return cells


def _resolve_row(row: dict[str, Any], number: int, job: Job) -> dict[str, Any]:
    """Return the request of the row's first copy; `error` is None if it can be drawn."""
    errors = []
    key: str | None = str(number)
    if "id" in row:
        key = None if row["id"] in (None, "") else str(row["id"])
    if key is None:
        errors.append("id = null: must be set")
    if row["prompt"] is None:
        errors.append("prompt = null: must be text; an empty prompt is allowed")
    elif not isinstance(row["prompt"], str):
        errors.append(f"prompt = {short_repr(row['prompt'])}: must be text")
        row["prompt"] = None
    cells = {
        name: value
        for name, value in row.items()
        if name in Sampling.model_fields and value is not None and not _is_empty(name, value)
    }
    values = {**job.sampling.model_dump(), **cells}
    if "seed" not in cells:
        values["seed"] = row_seed(job.sampling.seed, key or "")
    try:
        values = Sampling.model_validate(values, strict=False).model_dump()
        values["loras"] = write_loras(values["loras"], job.model.row_loras)
        check_seed(values["seed"], job.prompts.images_per_row)
    except ValidationError as error:
        errors.append(describe_error(error).rstrip("."))
        values = {
            field.name: _cast_or_none(values[field.name], field.type)
            for field in schema.SAMPLING[1:]
        }
    except ValueError as error:
        errors.append(str(error))
    return {
        **values,
        "prompt": row["prompt"],
        "row_key": key,
        "error": row.get(FAULT) or "; ".join(errors) or None,
    }


def _is_empty(name: str, value: Any) -> bool:
    """Return whether a text table's cell sets nothing; no negative prompt, no LoRA are values."""
    return value == "" and name not in ("negative_prompt", "loras")


def _copy(row: dict[str, Any], sample_index: int) -> dict[str, Any]:
    seed = row["seed"]
    if seed is not None and seed + sample_index <= MAX_SEED:
        seed += sample_index
    return {**row, "seed": seed, "sample_index": sample_index}


def _cast_or_none(value: Any, arrow_type: pa.DataType) -> Any:
    """Return the value if the output's column can hold it, else None; `error` names it anyway."""
    try:
        return pa.scalar(value).cast(arrow_type).as_py()
    except (pa.ArrowException, OverflowError):
        return None

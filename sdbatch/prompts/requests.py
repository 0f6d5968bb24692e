"""From rows of the prompt table to what is asked of the engine: one row an image, all resolved.

A row that cannot be drawn stays, with what was asked and why it cannot be. The images of row r
are r's copies 0 .. images_per_row - 1; image i of a file belongs to its row i // images_per_row.
"""

import hashlib
from typing import Any, get_args

import pyarrow as pa
from pydantic import ValidationError

from sdbatch import schema
from sdbatch.job import MAX_SEED, Column, Job, Sampling, explain

_NOT_SAMPLING = ("id", "prompt")


def row_seed(seed: int, row_key: str) -> int:
    """Return the seed in [0, 2**32) of a row whose table gives none.

    Not more bits: torch's CPU generator (mt19937) drops all but 32, and seeds that differ would
    draw the same noise unseen. The row's copies count up from it, so that theirs all differ.
    """
    text = f"{seed}\n{row_key}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "little")


def resolve(
    rows: pa.Table, shard: schema.Shard, job: Job, columns: dict[str, str], extras: pa.Schema
) -> pa.Table:
    """Return the requests of a shard, one row an image, with the columns of schema.requests.

    Args:
        rows: the rows `shard.rows(images_per_row)` of the shard's file.
        shard: which images of the file.
        job: gives what the table does not.
        columns: our name -> the table's name.
        extras: the columns that travel into the output.
    """
    copies = job.prompts.images_per_row
    start, _ = shard.rows(copies)
    used = [name for name in get_args(Column) if name in columns]
    values = {name: rows[columns[name]].to_pylist() for name in used}
    resolved = []
    for at in range(rows.num_rows):
        row = {name: column[at] for name, column in values.items()}
        resolved.append(_resolve_row(row, shard.first_row + start + at, job))
    images = range(shard.first_image, shard.first_image + shard.images)
    requests = [
        {
            **_copy(resolved[image // copies - start], image % copies),
            "key": schema.key(shard.shard, index),
        }
        for index, image in enumerate(images)
    ]
    table = pa.Table.from_pylist(requests, schema=schema.requests(pa.schema([])))
    taken = pa.array([image // copies - start for image in images], pa.int64())
    for field in extras:
        table = table.append_column(field, rows[field.name].take(taken))
    return table


def _resolve_row(row: dict[str, Any], number: int, job: Job) -> dict[str, Any]:
    """Return the row's request with the seed of its first copy; `error` says why it is none."""
    errors = []
    key: str | None = str(number)
    if "id" in row:
        key = None if row["id"] in (None, "") else str(row["id"])
    if key is None:
        errors.append("id = null: must be given")
    if row["prompt"] is None:
        errors.append("prompt = null: must be text; an empty prompt is legal")
    given = {
        name: value
        for name, value in row.items()
        if name not in _NOT_SAMPLING and value is not None and not _is_empty(name, value)
    }
    asked = {**job.sampling.model_dump(), **given}
    if "seed" not in given:
        asked["seed"] = row_seed(job.sampling.seed, key or "")
    try:
        asked = Sampling.model_validate(asked, strict=False).model_dump()
        if asked["seed"] > MAX_SEED + 1 - job.prompts.images_per_row:
            errors.append(
                f"seed = {asked['seed']}: must leave room for the row's copies below 2**63"
            )
    except ValidationError as error:
        errors.append(explain(error).rstrip("."))
        asked = {
            field.name: _fitting(asked[field.name], field.type) for field in schema.SAMPLING[1:]
        }
    return {
        **asked,
        "prompt": row["prompt"],
        "row_key": key,
        "error": "; ".join(errors) or None,
    }


def _is_empty(name: str, value: Any) -> bool:
    """Tell an empty cell of a text table, which asks for nothing, from an empty negative prompt."""
    return value == "" and name != "negative_prompt"


def _copy(row: dict[str, Any], sample_index: int) -> dict[str, Any]:
    seed = row["seed"]
    if seed is not None and seed + sample_index <= MAX_SEED:
        seed += sample_index
    return {**row, "seed": seed, "sample_index": sample_index}


def _fitting(value: Any, kind: pa.DataType) -> Any:
    """Return what was asked if the output's column can hold it; the error text names it anyway."""
    try:
        return pa.scalar(value).cast(kind).as_py()
    except (pa.ArrowException, OverflowError):
        return None

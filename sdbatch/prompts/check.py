"""What the rows of a table will be drawn as, found before anything is drawn.

`sdbatch plan` and the start of a run resolve the first rows; `sdbatch plan --check` resolves all.
"""

import hashlib
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sdbatch.errors import JobError, short_repr
from sdbatch.few_steps import Distilled, needs_distilled
from sdbatch.job import PICTURES, Job
from sdbatch.prompt_schedule import Calls, schedule
from sdbatch.prompt_syntax import choose_loras, find_syntax, parse_weights
from sdbatch.prompts import table
from sdbatch.prompts.columns import describe_columns
from sdbatch.prompts.idle_keys import describe_idle_keys
from sdbatch.prompts.pictures import Pictures, folder_of
from sdbatch.prompts.requests import Known, resolve_rows
from sdbatch.prompts.table import Table
from sdbatch.prompts.types import is_text

FIRST_ROWS = 100
EXAMPLES = 3
MOST_HASHES = 2**25  # of rows, and of images: 8 bytes each, so 512 MiB in all
SOME_CALLS = 25  # of the denoiser, for which texts over time are read
_MOST_FAULTS = 50  # reasons that are counted apart
_SHOWN = (
    "row_key",
    "prompt",
    "negative_prompt",
    "height",
    "width",
    "num_inference_steps",
    "guidance_scale",
    "sampler",
    "seed",
)


@dataclass
class Found:
    """Rows that have something in common."""

    rows: int
    example: str  # what the first of them has
    row: str  # its key, or its number


@dataclass
class Check:
    """What resolving rows has shown."""

    whole: bool  # all rows, or the first ones
    rows: int = 0  # that were resolved; where prompts are in lists, captions
    examples: list[dict[str, Any]] = field(default_factory=list)  # of rows that can be drawn
    faults: list[Found] = field(default_factory=list)  # of rows that cannot, by reason
    weights: Found | None = None  # prompts with weights that are drawn as text
    syntax: Found | None = None  # prompts with other syntax that is drawn as text
    misfits: dict[str, Found] = field(default_factory=dict)  # values that spoil, by key and part
    ids: int | None = None  # rows whose id an earlier row has; None: not counted
    images: int | None = None  # images whose prompt and seed an earlier one has; without pictures
    hashed: int = 0  # images that were compared for this
    rows_per_s: float = 0.0

    @property
    def _where(self) -> str:
        return f"of {self.rows:,} rows" if self.whole else f"of the first {self.rows:,} rows"

    def notes(self) -> Iterator[str]:
        """Yield what a user should know before drawing."""
        for fault in self.faults:
            yield (
                f"{fault.rows:,} {self._where} cannot be drawn: {fault.example} "
                f"(the first is row {fault.row})"
            )
        for found, why in (
            (self.weights, "as sampling.prompt_weights is off"),
            (self.syntax, "as sampling.prompt_weights does not read it either"),
        ):
            if found is not None:
                yield (
                    f"{found.rows:,} {self._where} have prompts like {found.example}: drawn as "
                    f"text, {why} (the first is row {found.row})"
                )
        for found in self.misfits.values():
            first = f"(the first is row {found.row})"
            yield f"{found.rows:,} {self._where} have {found.example} {first}"
        if self.ids:
            yield f"{self.ids:,} rows have the id of an earlier row, so that they share its key"
        if self.images:
            among = f" among the first {self.hashed:,}" if self.hashed == MOST_HASHES else ""
            yield f"{self.images:,} images{among} have the prompt and the seed of an earlier image"

    def text(self) -> list[str]:
        """Return the examples, and the speed of a whole check, in lines."""
        lines = [line for example in self.examples for line in _example_lines(example)]
        if self.whole:
            lines.append(f"checked    {self.rows:,} rows, {self.rows_per_s:,.0f} rows/s")
        return lines


def _example_lines(row: dict[str, Any]) -> list[str]:
    negative = row["negative_prompt"]
    return [
        f"row {row['row_key']}".ljust(10) + f" {short_repr(row['prompt'])}",
        f"           {row['width']}x{row['height']}, {row['num_inference_steps']} steps, guidance "
        f"{row['guidance_scale']:g}, {row['sampler']}, seed {row['seed']}"
        + (f", negative {short_repr(negative)}" if negative else ""),
    ]


def check_rows(
    job: Job,
    prompts: Table,
    distilled: Sequence[Distilled] = (),
    *,
    edits: bool = False,
    whole: bool = False,
) -> Check:
    """Resolve the first rows of a table, or all of them, a few in memory at a time.

    Args:
        job: its values apply where the table has none.
        prompts: the table.
        distilled: parts of the job's model that need certain values.
        edits: whether the model draws nothing without a picture.
        whole: resolve all rows.

    Raises:
        JobError: a distilled model cannot be drawn with the job's values, and no row has others; or
            no row has the picture that the model needs.
    """
    if edits and "image" not in prompts.columns:
        raise JobError(
            "prompts.columns = no image: must name a column of pictures, as the model edits "
            "pictures by instruction. Name it, or choose another model."
        )
    _refuse_misfits(job, prompts, distilled)
    check = Check(whole)
    faults: dict[tuple[str, str], Found] = {}
    hashes = _Hashes(job, prompts) if whole else None
    began = time.perf_counter()
    broken = _find_broken(job, prompts)
    for rows in _resolved_rows(job, prompts, whole):
        for row in rows:
            row["error"] = row["error"] or broken.get(check.rows)
            if row["error"] is None:
                _check_row(check, row, job.model.row_loras, distilled)
            if row["error"] is not None:
                _count_fault(faults, row, check.rows)
            elif len(check.examples) < EXAMPLES:
                check.examples.append({name: row[name] for name in _SHOWN})
            check.rows += 1
        if hashes is not None:
            hashes.add(rows)
    check.faults = sorted(faults.values(), key=lambda fault: -fault.rows)
    check.rows_per_s = check.rows / max(1e-9, time.perf_counter() - began)
    if hashes is not None:
        check.ids, check.images, check.hashed = hashes.count()
    return check


def describe_table(job: Job, prompts: Table) -> Iterator[str]:
    """Yield what a user should know of the table's columns, and of keys that change nothing."""
    yield from describe_columns(job.prompts, job.sampling, prompts.columns, prompts.names)
    yield from describe_idle_keys(job, prompts.columns)


def _resolved_rows(job: Job, prompts: Table, whole: bool) -> Iterator[list[dict[str, Any]]]:
    """Yield the requests of the first copies, in order."""
    used = {name for ours, name in prompts.columns.items() if ours not in PICTURES}
    columns = pa.schema([each for each in prompts.schema if each.name in used])
    left = min(prompts.rows, job.prompts.limit or prompts.rows)
    left = left if whole else min(left, FIRST_ROWS)
    in_job, reader = job.prompts.rows, job.prompts.reader
    first_row, known = 0, Known(job)
    for source in prompts.sources:
        start = 0
        parts: Iterable[pa.Table]
        if whole:
            parts = table.iter_tables(source, columns, in_job, reader)
        else:
            stop = min(left, source.prompts)
            parts = [table.read_rows(source, 0, stop, columns, in_job, reader)] if stop else []
        for part in parts:
            rows, _ = resolve_rows(part, first_row, job, prompts.columns, start, known)
            yield rows[:left]
            left -= len(rows[:left])
            start += part.num_rows
            if not left:
                return
        first_row += source.rows


def find_relative_picture(job: Job, prompts: Table) -> str | None:
    """Return the first picture that the first rows name by a path from the table's folder."""
    for pictures, tables in _named_pictures(job, prompts):
        for name in pictures.relative_names(tables):
            return name
    return None


def _find_broken(job: Job, prompts: Table) -> dict[int, str]:
    """Return which of the first rows name a picture that is not there, or none, and why.

    Of local files the beginning is read. Prompts in lists are skipped.
    """
    if any(source.captions is not None for source in prompts.sources):
        return {}
    found = (
        reason
        for pictures, tables in _named_pictures(job, prompts)
        for reason in pictures.find_broken(tables)
    )
    return {row: reason for row, reason in enumerate(found) if reason is not None}


def _named_pictures(job: Job, prompts: Table) -> Iterator[tuple[Pictures, Iterator[pa.Table]]]:
    """Yield for each file of the first rows its columns of text that name pictures."""
    named = pa.schema([field for field in prompts.pictures if is_text(field.type)])
    left = FIRST_ROWS if named.names else 0
    for source in prompts.sources:
        if not left:
            return
        span = 0, min(source.rows, left)
        folder = folder_of(source.url) if job.prompts.rows is None else os.getcwd()
        tables = table.iter_pictures(source, span, named, job.prompts.rows, job.prompts.reader)
        yield Pictures(prompts.columns, folder, size_from_image=False), tables
        left -= span[1]


def _count_fault(faults: dict[tuple[str, str], Found], row: dict[str, Any], number: int) -> None:
    """Count a row that cannot be drawn, by the column and the rule of its first error."""
    error = row["error"]
    rule = re.search(r": (must [^.;]*)", error)
    kind = error.partition(" = ")[0], re.sub(r"\d+|'[^']*'", "", rule[1] if rule else "")
    if kind not in faults and len(faults) >= _MOST_FAULTS:
        kind = next(reversed(faults))
    found = faults.setdefault(kind, Found(0, error, _name(row, number)))
    found.rows += 1


def _refuse_misfits(job: Job, prompts: Table, distilled: Sequence[Distilled]) -> None:
    """Raise a JobError if the job's own values spoil all pictures of a model that says what it is.

    Another number of steps does not spoil them.
    """
    values = job.sampling.model_dump()
    for part in distilled:
        for key, must in part.recipe.conflicts(values):
            if part.certain and key != "num_inference_steps" and key not in prompts.columns:
                raise JobError(
                    f"sampling.{key} = {values[key]!r}: must be {must} with {part}. Set it so; if "
                    f"the model is no such one, name another scheduler in its model_index.json."
                )


def _check_row(
    check: Check, row: dict[str, Any], loras: Mapping[str, float], distilled: Sequence[Distilled]
) -> None:
    """Count what a row's text and values spoil; set its error if its syntax cannot be read."""
    try:
        prompt, chosen = choose_loras(row["prompt"], row["loras"], loras)
    except ValueError as error:
        row["error"] = str(error)
        return
    _check_syntax(check, row, prompt)
    if row["error"] is None:
        _count_misfits(check, row, [each for each in distilled if each.applies(chosen)])


def _count_misfits(check: Check, row: dict[str, Any], distilled: Sequence[Distilled]) -> None:
    """Count values that spoil what the distilled parts of the row's model draw."""
    misfits = {
        f"{key} {part.where}": f"{key} = {row[key]!r}: must be {must} with {part}"
        for part in distilled
        for key, must in part.recipe.conflicts(row)
    }
    if not distilled and needs_distilled(row["sampler"]):
        misfits["sampler"] = (
            f"sampler = {row['sampler']!r}, which is for models of few steps, but neither the "
            f"model nor a LoRA of theirs is one by its name"
        )
    for key, text in misfits.items():
        found = check.misfits.setdefault(key, Found(0, text, _name(row, check.rows)))
        found.rows += 1


def _check_syntax(check: Check, row: dict[str, Any], prompt: str) -> None:
    """Count syntax that is drawn as text; set the row's error if the syntax cannot be read.

    Args:
        check: where it is counted.
        row: that is resolved.
        prompt: of the row, without LoRAs.
    """
    texts = {name: row[name] for name in ("negative_prompt", "prompt_b")}
    for name, text in {"prompt": prompt, **texts}.items():
        try:
            example = None if row["prompt_weights"] else find_syntax(text)
            if row["prompt_weights"] or example is not None:
                _parse(text, row["chunk_prompts"] or not row["prompt_weights"])
        except ValueError as error:
            if row["prompt_weights"]:
                row["error"] = f"{name} = {error}"
                return
            check.syntax = _count(check.syntax, str(example), row, check.rows)
            return
        if example is not None:
            check.weights = _count(check.weights, example, row, check.rows)
            return


def _parse(prompt: str, chunked: bool) -> None:
    """Raise a ValueError if a prompt cannot be read, at whatever step."""
    for text in dict.fromkeys(text for _, text in schedule(prompt, Calls(SOME_CALLS))):
        parse_weights(text, chunked=chunked)


def _count(found: Found | None, example: str, row: dict[str, Any], number: int) -> Found:
    found = found or Found(0, short_repr(example), _name(row, number))
    found.rows += 1
    return found


def _name(row: dict[str, Any], number: int) -> str:
    """Return the key of a row, or its number in the table if it has none."""
    return f"number {number}" if row["row_key"] is None else repr(row["row_key"])


class _Hashes:
    """Hashes of the rows' ids and of the images' prompts and seeds, 8 bytes each.

    Of 2**25 hashes two that are equal by chance are expected in 1 of 30,000 tables.
    """

    def __init__(self, job: Job, prompts: Table) -> None:
        self._copies = job.prompts.images_per_row
        self._has_ids = "id" in prompts.columns
        rows = min(prompts.rows, job.prompts.limit or prompts.rows)
        self._ids = _Column(rows if self._has_ids else 0)
        # Of one prompt and seed the images of several pictures are other ones.
        self._images = _Column(0 if "image" in prompts.columns else rows * self._copies)

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Add the rows that can be drawn."""
        drawn = [row for row in rows if row["error"] is None]
        if self._has_ids:
            self._ids.add(_hash([row["row_key"] for row in drawn]))
        room = -(-self._images.room // self._copies)
        drawn = drawn[:room]
        prompts = _hash([row["prompt"] for row in drawn])
        seeds = np.array([row["seed"] for row in drawn], np.uint64)
        copies = min(self._copies, self._images.room)
        all_seeds: NDArray[np.uint64] = seeds[:, None] + np.arange(copies).astype(np.uint64)
        self._images.add(_mix(prompts[:, None] ^ _mix(all_seeds)).ravel())

    def count(self) -> tuple[int | None, int, int]:
        """Return the rows and the images that an earlier one equals, and how many images count."""
        ids = self._ids.count_repeated() if self._has_ids else None
        return ids, self._images.count_repeated(), self._images.used


class _Column:
    """Hashes in one array, at most MOST_HASHES."""

    def __init__(self, size: int) -> None:
        self._hashes = np.empty(min(size, MOST_HASHES), np.uint64)
        self.used = 0

    @property
    def room(self) -> int:
        return len(self._hashes) - self.used

    def add(self, hashes: NDArray[np.uint64]) -> None:
        hashes = hashes[: self.room]
        self._hashes[self.used : self.used + len(hashes)] = hashes
        self.used += len(hashes)

    def count_repeated(self) -> int:
        used = self._hashes[: self.used]
        used.sort()
        return int((used[1:] == used[:-1]).sum())


def _hash(texts: list[str]) -> NDArray[np.uint64]:
    digests = [hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts]
    return np.frombuffer(b"".join(digests), np.uint64)


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return numbers that differ in half of their bits where `values` differ in any.

    Source: Steele et al. 2014, SplitMix64.
    """
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))

"""`sdbatch verify --redraw`: draw committed images again, without Ray, and compare their bytes."""

import math
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from sdbatch import resolve, schema
from sdbatch.errors import PromptTableError, SdbatchError, StorageError
from sdbatch.models import find_model as models
from sdbatch.output import identity, reader
from sdbatch.output.image_file import encoding_of
from sdbatch.output.record import Record, require_record
from sdbatch.prompts.table import Table, open_table
from sdbatch.stages.base import added_columns, with_shard
from sdbatch.stages.draw import DrawImages
from sdbatch.stages.read import ReadPrompts
from sdbatch.stages.safety import ApplySafety, SafetyPolicy
from sdbatch.storage import Store


@dataclass(frozen=True)
class Redrawn:
    """An image that was drawn again."""

    key: str
    psnr: float | None  # dB; infinite if the pixels are equal; None: the old image is damaged
    same_bytes: bool
    versions_differ: bool  # from those that drew the output
    obstacle: str | None = None  # why it was not drawn again

    @property
    def is_fault(self) -> bool:
        """Tell whether the image differs though it must have the same bytes, or is damaged."""
        if self.obstacle is not None:
            return False
        return not self.same_bytes and (self.psnr is None or not self.versions_differ)

    def text(self) -> str:
        """Return the result in one line."""
        if self.obstacle is not None:
            return f"{self.key}: not drawn again: {self.obstacle}"
        if self.same_bytes:
            return f"{self.key}: drawn again, the same bytes"
        if self.psnr is None:
            return f"{self.key}: drawn again, but the image of the output cannot be decoded"
        why = "other library versions" if self.versions_differ else "the same library versions"
        return f"{self.key}: drawn again with {why}, PSNR {self.psnr:.1f} dB"


def redraw_images(store: Store, count: int) -> Iterator[Redrawn]:
    """Draw `count` images of an output again, chosen at random, and compare them.

    Raises:
        SdbatchError: there is no output, no image, or the model cannot be loaded.
    """
    record = require_record(store)
    images = reader.open_images(store)
    chosen = random.sample(range(len(images)), min(count, len(images)))
    rows = []
    source = _Pictures(record)
    for row in images.rows_at(chosen):
        try:
            rows.append(row | {schema.INPUTS.name: source.inputs_of(row), "error": None})
        except SdbatchError as error:
            yield Redrawn(row["key"], None, False, False, str(error))
    if not rows:
        return
    files, job = resolve.find_model(record.job)
    gpus = 1 if job.engine.device == "cuda" else 0
    resolved = resolve.resolve(job, files, gpus, models.sha256(files))
    encoding = encoding_of(resolved.job)
    stage = DrawImages(resolved.make_engine(schema.OUTPUT_NAMES), encoding, again=job.draw_again)
    stage.open()
    wanted = schema.requests(schema.NO_COLUMNS)
    table = pa.Table.from_pylist(rows, wanted)
    drawn = stage(with_shard(table, record.planned()[0]))
    drawn = ApplySafety(SafetyPolicy(job.safety.policy), encoding)(drawn)
    differ = identity.versions() != record.versions
    for row, again in zip(rows, drawn.to_pylist(), strict=True):
        same = again["image"] is not None and again["image"]["bytes"] == row["image"]["bytes"]
        yield Redrawn(row["key"], _psnr(row, again), same, differ)


class _Pictures:
    """The pictures that images of an output were drawn from, read again from the prompt table."""

    def __init__(self, record: Record) -> None:
        self._record = record

    @cached_property
    def _table(self) -> Table:
        return open_table(self._record.job.prompts, added_columns(self._record.job).names)

    def inputs_of(self, row: dict[str, Any]) -> bytes | None:
        """Return the inputs of an image; None: it was drawn from text.

        Raises:
            SdbatchError: the table or the picture is gone, or another one.
        """
        if row["image_sha256"] is None:
            return None
        number, index = map(int, row["key"].split("-"))
        shard = self._record.planned()[number]
        urls = {source.name: source.url for source in self._table.sources}
        if shard.source not in urls:
            raise PromptTableError(f"prompts.path = {shard.source} is missing: must be there.")
        one = replace(shard, first_image=shard.first_image + index, images=1)
        planned = pa.Table.from_pylist([{**asdict(one), "url": urls[shard.source]}])
        (request,) = ReadPrompts(self._record.job, self._table)(planned).to_pylist()
        if request["error"] is not None:
            raise PromptTableError(request["error"])
        for field in schema.INPUT_HASHES:
            if request[field.name] != row[field.name]:
                raise PromptTableError(
                    f"{field.name} = {request[field.name]}: must be {row[field.name]}, as the "
                    f"image was drawn from that file. Restore it."
                )
        inputs: bytes = request[schema.INPUTS.name]
        return inputs


def _psnr(row: dict[str, Any], again: dict[str, Any]) -> float | None:
    """Return how close an image is to the old one; None if the old one cannot be decoded."""
    try:
        old = reader.open_picture(row)
    except StorageError:
        return None
    if again["image"] is None:
        return 0.0
    first, second = (np.asarray(each, float) for each in (old, reader.open_picture(again)))
    if first.shape != second.shape:
        return 0.0
    error = float(((first - second) ** 2).mean())
    return 10 * math.log10(255**2 / error) if error else math.inf

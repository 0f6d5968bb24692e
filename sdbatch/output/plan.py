"""Which shards a job has: the table cut into them.

A plan is a function of the job and the table alone: never of the cluster, the time or the place.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from sdbatch.errors import JobError, PromptTableError
from sdbatch.job import Job, Output
from sdbatch.job.sections import MOST_PLANNED
from sdbatch.output import identity
from sdbatch.output.formats.parquet import MOST_ROW_GROUP_BYTES
from sdbatch.output.identity import WAYS
from sdbatch.output.record import Record
from sdbatch.prompts.frozen import with_types
from sdbatch.prompts.sizes import SIDES
from sdbatch.prompts.table import Source, Table
from sdbatch.schema import Shard

MOST_SHARDS = 10**7
MOST_IMAGES = 1000  # in a shard of automatic size
AIM_BYTES = 256 * 2**20
MOST_BYTES = 2 * 2**30  # a shard is held in memory while it is drawn
# Of a row's picture, a pixel: as it is drawn from, and as a lossless file; its mask, twice each.
PICTURE_BYTES, MASK_BYTES = 3 + 3, 1 + 1 + 3 + 1
PICTURE = (1024, 1024)  # the size that pictures have whose rows have their size
PHOTO = (3000, 4000)  # the size that pictures have which only_masked puts the drawn part into
SHARES, LEAST_IMAGES = 64, 32  # a small job is cut into up to 64 shards of at least 32 images


@dataclass(frozen=True)
class Plan:
    """The shards of a job, in order, and the table that they are cut from."""

    job: Job  # with output.images_per_shard written into it
    table: Table
    shards: tuple[Shard, ...]
    rows: int
    images_per_shard: int
    largest: tuple[int, int]  # height and width of the largest image

    @property
    def images(self) -> int:
        """Return the number of images, drawn or failed, that the output will account for."""
        return sum(shard.images for shard in self.shards)

    @property
    def most_images(self) -> int:
        """Return the number of images in the largest shard."""
        return max(shard.images for shard in self.shards)

    @property
    def shard_bytes(self) -> int:
        """Return a bound on the bytes of a shard's images: all are the largest, and pure noise.

        What they are drawn from is counted too.
        """
        return self.most_images * row_bytes(self.job, self.table, self.largest)

    @property
    def fitting_images(self) -> int:
        """Return how many of the largest images a shard of automatic size may hold."""
        return images_that_fit(self.job, self.table, self.largest)

    @property
    def shard_memory(self) -> int:
        """Return a bound on the bytes that a process needs to draw or to write a shard.

        Drawing holds the images twice; Parquet its file and a row group twice, as a page of a row
        group is as large as that. The numbers are those of benchmarks/shard_memory.py.
        """
        size = self.shard_bytes
        return int(max(2.2 * size, 1.1 * size + 2 * min(size, MOST_ROW_GROUP_BYTES)))

    def urls(self) -> dict[str, str]:
        """Return the URLs of the table's files, by name."""
        return {source.name: source.url for source in self.table.sources}


def make_plan(job: Job, table: Table, record: Record | None) -> Plan:
    """Cut the table into shards; if the output exists, keep its shards and add new ones.

    Raises:
        JobError: the job is not that of the existing output (the key is named), or a shard of the
            requested size could not be held in memory.
        PromptTableError: a file that the existing output was cut from has changed or is missing.
    """
    if record is not None:
        job = identity.adopt(job, record.job)
        identity.check_unchanged(job, record.job, record.versions)
    known = (record and record.shards) or ()  # none: plan.parquet is missing, or the output is new
    if record is not None and known:
        if sorted(record.extras.names) != sorted(table.extras.names):
            raise PromptTableError(
                f"prompts.path = columns {', '.join(table.extras.names) or 'none'}: must be those "
                f"of the existing output, {', '.join(record.extras.names) or 'none'}. {WAYS}"
            )
        names = {shard.source for shard in known}
        table = with_types(table, record.extras, job.prompts, names)
        table = replace(table, sources=_keep_order(table, known))
    rows = min(table.rows, job.prompts.limit or table.rows)
    images = rows * job.prompts.row_images
    largest = table.sizes.largest(job.sampling)
    if job.prompts.size_from_image:
        largest = max(largest, PICTURE, key=math.prod)
    largest = final_size(job, table, largest)
    size = images_per_shard(job, table, images, largest)
    _check_size(rows, images, size)
    job = job.updated(output=job.output.updated(images_per_shard=size))
    shards = tuple(_cut(job, table, size))
    if shards[: len(known)] != known:
        raise PromptTableError(
            "prompts.path = files that change the shards of the existing output: new rows must be "
            f"in new files, and prompts.limit must not exclude them. {WAYS}"
        )
    return Plan(job, table, shards, rows, size, largest)


def _check_size(rows: int, images: int, images_per_shard: int) -> None:
    """Raise a JobError if the plan would be too large, before anything of it is in memory."""
    if images > MOST_PLANNED:
        raise JobError(
            f"prompts.images_per_row = {images // rows:,} for {rows:,} rows: makes {images:,} "
            f"images, must be at most {MOST_PLANNED:,}. Divide the table into several jobs."
        )
    shards = -(-images // images_per_shard)
    if shards > MOST_SHARDS:
        raise JobError(
            f"output.images_per_shard = {images_per_shard}: makes {shards:,} shards, must be at "
            f"most {MOST_SHARDS:,}. Set a larger number, or divide the table into several jobs."
        )


def final_size(job: Job, table: Table, size: tuple[int, int]) -> tuple[int, int]:
    """Return height and width of an image after hires fix, and after stages that draw again.

    Where rows set hires_scale, they are taken to double the image.
    """
    scale = max(job.sampling.hires_scale, 2 if "hires_scale" in table.columns else 1)
    height, width = (int(side * scale) for side in size)
    for again in job.draw_again:
        more = again.get("hires_scale", 1)
        height, width = (
            int(again.get(name, side) * more)
            for name, side in zip(SIDES, (height, width), strict=True)
        )
    return height, width


def image_bytes(output: Output, height: int, width: int) -> int:
    """Return a bound on the bytes of one encoded image: that of pure noise, and its metadata."""
    encoder, quality = output.encoder, output.encoder_quality
    default = quality is None or encoder.quality is None or quality <= encoder.quality
    per_pixel = encoder.noise_bytes if default else encoder.best_noise_bytes
    return int(height * width * per_pixel) + 4096


def row_bytes(job: Job, table: Table, size: tuple[int, int]) -> int:
    """Return a bound on the bytes of an image and of the pictures that it is drawn from."""
    found = image_bytes(job.output, *size)
    if "image" not in table.columns:
        return found
    masked = "mask_image" in table.columns or job.sampling.mask_from_alpha
    found += size[0] * size[1] * (PICTURE_BYTES + MASK_BYTES * masked)
    if job.sampling.only_masked or "only_masked" in table.columns:
        found += 2 * image_bytes(job.output, *PHOTO)  # it comes and goes as a file
    return found


def images_per_shard(job: Job, table: Table, images: int, largest: tuple[int, int]) -> int:
    """Return the number of images in a shard: the job's, or a choice from job and table alone.

    Args:
        job: if it sets a number, that of an existing output included, that is kept.
        table: whose rows may have pictures.
        images: of the job.
        largest: height and width of the largest image.
    """
    size = job.output.images_per_shard
    if size != "auto":
        own = final_size(job, table, (job.sampling.height, job.sampling.width))
        each = row_bytes(job, table, own)
        if size * each > MOST_BYTES:
            raise JobError(
                f"output.images_per_shard = {size}: must be at most {MOST_BYTES // each}, as a "
                f"shard is held in memory while it is drawn: 2 GiB hold that many."
            )
        return size
    share = max(LEAST_IMAGES, -(-images // SHARES))
    return min(share, MOST_IMAGES, images_that_fit(job, table, largest))


def images_that_fit(job: Job, table: Table, size: tuple[int, int]) -> int:
    """Return how many images of `size` a shard of automatic size may hold, at least 1."""
    return max(1, AIM_BYTES // row_bytes(job, table, size))


def _cut(job: Job, table: Table, size: int) -> Iterator[Shard]:
    left = job.prompts.limit or table.rows
    first_row = number = 0
    for source in table.sources:
        images = min(source.prompts, left) * job.prompts.row_images
        for first in range(0, images, size):
            yield Shard(
                number, source.name, source.checksum, first_row, first, min(size, images - first)
            )
            number += 1
        first_row += source.rows
        left -= min(source.prompts, left)


def _keep_order(table: Table, shards: Sequence[Shard]) -> tuple[Source, ...]:
    """Return the files in the order of the existing output, then the new ones."""
    sources = {source.name: source for source in table.sources}
    known = {shard.source: shard.checksum for shard in shards}
    for name, checksum in known.items():
        if name not in sources:
            raise PromptTableError(
                f"prompts.path = {name} is missing: the output was begun with it. {WAYS}"
            )
        if sources[name].checksum != checksum:
            raise PromptTableError(
                f"prompts.path = {name} has changed since the output was begun. Put new rows into "
                f"a new file. {WAYS}"
            )
    return (*(sources[name] for name in known), *(s for s in table.sources if s.name not in known))

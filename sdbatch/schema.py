"""The columns of the tables that pass between stages and into files.

Field order here is column order in the output. `extras` are the prompt table's own columns,
which travel through unchanged; `scores` are the columns that the job's stages add. Nothing here
reads or writes a file.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_origin

import pyarrow as pa

from sdbatch.sampling import Sampling

_LARGEST_INT32 = 2**31 - 1
_TYPES: dict[Any, pa.DataType] = {str: pa.string(), float: pa.float64(), bool: pa.bool_()}
NO_COLUMNS = pa.schema([])
# Metadata of a file and, here, of a field of `extras`: the feature that `datasets` gave the column.
FEATURE = b"huggingface"


def _arrow_type(name: str) -> pa.DataType:
    field = Sampling.model_fields[name]
    if field.annotation is int:
        bounds = [bound for each in field.metadata if (bound := getattr(each, "le", None))]
        return pa.int32() if bounds and max(bounds) <= _LARGEST_INT32 else pa.int64()
    return pa.string() if get_origin(field.annotation) is Literal else _TYPES[field.annotation]


SAMPLING = (
    pa.field("prompt", pa.string()),
    *(pa.field(name, _arrow_type(name)) for name in Sampling.model_fields),
)
INPUT_HASHES = (
    pa.field("image_sha256", pa.string()),  # of the row's picture file; null: it has none
    pa.field("mask_sha256", pa.string()),
)
ROW = (
    pa.field("row_key", pa.string()),
    pa.field("sample_index", pa.int32()),
    *INPUT_HASHES,
)
# The row's pictures on their way to the engine, as Prepared.to_bytes writes them; never in the
# output. No table has a column of this name.
INPUTS = pa.field("sdbatch: inputs", pa.large_binary())
DRAWN = (
    pa.field("prompt_tokens", pa.int32()),  # without the begin and end marks, before truncation
    pa.field("prompt_truncated", pa.bool_()),  # the prompt or the negative prompt lost tokens
    pa.field("decoded_again", pa.bool_()),  # in float32: not finite in the engine's dtype
    pa.field("nsfw", pa.bool_()),  # null: not checked
    pa.field("nsfw_scores", pa.list_(pa.float32())),  # by the checker's concepts; above 0: nsfw
    pa.field("sha256", pa.string()),  # of the image file
)
KEY = pa.field("key", pa.string())
ERROR = pa.field("error", pa.string())  # null: nothing wrong so far
# Hugging Face `datasets`' storage of an Image feature.
IMAGE = pa.field("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
RESULTS = (IMAGE, *DRAWN)  # what drawing adds to a row

OUTPUT_NAMES = tuple(f.name for f in (KEY, IMAGE, *SAMPLING, *ROW, *DRAWN, ERROR))

PLAN = pa.schema(
    [
        ("shard", pa.int64()),
        ("source", pa.string()),  # a file of the prompt table, relative to prompts.path
        ("checksum", pa.string()),  # of that file
        ("first_row", pa.int64()),  # number in the table of the file's first row
        ("first_image", pa.int64()),  # number in the file of the shard's first image
        ("images", pa.int64()),
    ]
)


@dataclass(frozen=True)
class Shard:
    """A row of PLAN: the images of one output file, all from one file of the prompt table."""

    shard: int
    source: str
    checksum: str
    first_row: int
    first_image: int
    images: int

    def rows(self, row_images: int) -> tuple[int, int]:
        """Return the source's rows [start, stop) that the images belong to."""
        last = self.first_image + self.images - 1
        return self.first_image // row_images, last // row_images + 1


def requests(extras: pa.Schema) -> pa.Schema:
    """Return the schema of a shard that was read: one row an image to draw."""
    return pa.schema([KEY, *SAMPLING, *ROW, INPUTS, ERROR, *extras])


def images(extras: pa.Schema, scores: pa.Schema = NO_COLUMNS) -> pa.Schema:
    """Return the schema of data/: one row an image."""
    return pa.schema([KEY, IMAGE, *SAMPLING, *ROW, *DRAWN, *scores, *extras])


def failed(extras: pa.Schema, scores: pa.Schema = NO_COLUMNS) -> pa.Schema:
    """Return the schema of failed/: the columns of `images`, then why there is no image."""
    return images(extras, scores).append(ERROR)


def extras_of(table: pa.Schema, scores: pa.Schema = NO_COLUMNS) -> pa.Schema:
    """Return the prompt table's own columns of a table of any schema above."""
    known = {*OUTPUT_NAMES, *scores.names}
    return pa.schema([field for field in table if field.name not in known])


def key(shard: int, index: int) -> str:
    """Return the name of an image: dot-free, as WebDataset cuts names at the first dot."""
    return f"{shard:06d}-{index:06d}"


def shard_name(shard: int) -> str:
    """Return the stem of the files of `shard`."""
    return f"{shard:06d}"

"""The tables that pass between stages and into files, column by column.

Field order here is column order in the output. `extras` are the prompt table's own columns,
which travel through unchanged. Nothing here reads or writes a file.
"""

from dataclasses import dataclass

import pyarrow as pa

SAMPLING = (
    pa.field("prompt", pa.string()),
    pa.field("negative_prompt", pa.string()),
    pa.field("seed", pa.int64()),
    pa.field("num_inference_steps", pa.int32()),
    pa.field("guidance_scale", pa.float64()),
    pa.field("sampler", pa.string()),
    pa.field("height", pa.int32()),  # pixels
    pa.field("width", pa.int32()),  # pixels
    pa.field("guidance_rescale", pa.float64()),  # [0, 1]
    pa.field("guidance_start", pa.float64()),  # part of the steps, [0, 1]
    pa.field("guidance_stop", pa.float64()),  # part of the steps, [0, 1]
    pa.field("eta", pa.float64()),  # [0, 1]
    pa.field("clip_skip", pa.int32()),  # layers
    pa.field("prompt_weights", pa.bool_()),
    pa.field("chunk_prompts", pa.bool_()),
)
ROW = (
    pa.field("row_key", pa.string()),
    pa.field("sample_index", pa.int32()),
)
DRAWN = (
    pa.field("prompt_tokens", pa.int32()),  # without the begin and end marks, before truncation
    pa.field("prompt_truncated", pa.bool_()),  # the prompt or the negative prompt lost tokens
    pa.field("nsfw", pa.bool_()),  # null: not checked
    pa.field("nsfw_scores", pa.list_(pa.float32())),  # by the checker's concepts; above 0: nsfw
    pa.field("sha256", pa.string()),  # of the image file
)
KEY = pa.field("key", pa.string())
ERROR = pa.field("error", pa.string())  # null: nothing wrong so far
# Hugging Face `datasets`' storage of an Image feature.
IMAGE = pa.field("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))

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

    def rows(self, images_per_row: int) -> tuple[int, int]:
        """Return the source's rows [start, stop) that the images belong to."""
        last = self.first_image + self.images - 1
        return self.first_image // images_per_row, last // images_per_row + 1


MANIFEST = pa.schema(
    [
        ("shard", pa.int64()),
        ("images", pa.int64()),
        ("failed", pa.int64()),
        ("reasons", pa.string()),  # JSON: reason -> rows
        (
            "files",
            pa.list_(
                pa.struct([("name", pa.string()), ("bytes", pa.int64()), ("sha256", pa.string())])
            ),
        ),
        ("facts", pa.string()),  # JSON: when, where and by what the shard was drawn
    ]
)

# A shard between two stages: one row of a Ray Data block, so that no block is ever split or joined.
BLOCK = pa.schema(
    [
        ("shard", pa.int64()),
        ("rows", pa.large_binary()),  # the shard's table as an Arrow IPC stream
        ("facts", pa.string()),  # JSON
    ]
)


def requests(extras: pa.Schema) -> pa.Schema:
    """Return the schema of a shard that was read: one row an image to draw."""
    return pa.schema([KEY, *SAMPLING, *ROW, ERROR, *extras])


def images(extras: pa.Schema) -> pa.Schema:
    """Return the schema of data/*.parquet: one row an image."""
    return pa.schema([KEY, IMAGE, *SAMPLING, *ROW, *DRAWN, *extras])


def failed(extras: pa.Schema) -> pa.Schema:
    """Return the schema of failed/*.parquet: the columns of `images`, then why there is none."""
    return images(extras).append(ERROR)


def extras_of(table: pa.Schema) -> pa.Schema:
    """Return the prompt table's own columns of a table of any schema above."""
    return pa.schema([field for field in table if field.name not in OUTPUT_NAMES])


def key(shard: int, index: int) -> str:
    """Return the name of an image: dot-free, as WebDataset cuts names at the first dot."""
    return f"{shard:06d}-{index:06d}"


def shard_name(shard: int) -> str:
    """Return the stem of the files of `shard`."""
    return f"{shard:06d}"


def pack(shard: int, rows: pa.Table, facts: str) -> pa.Table:
    """Put a shard's table into a block of one row."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema) as stream:
        stream.write_table(rows)
    row = {"shard": shard, "rows": sink.getvalue().to_pybytes(), "facts": facts}
    return pa.Table.from_pylist([row], schema=BLOCK)


def unpack(block: pa.Table) -> tuple[int, pa.Table, str]:
    """Take the shard number, the table and the facts out of a block that `pack` made."""
    if block.num_rows != 1:
        raise RuntimeError(f"a block of {block.num_rows} rows: a block holds exactly one shard")
    rows = pa.ipc.open_stream(block["rows"][0].as_buffer()).read_all()
    return block["shard"][0].as_py(), rows, block["facts"][0].as_py()

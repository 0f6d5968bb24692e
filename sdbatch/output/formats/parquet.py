"""A shard as Parquet, as Hugging Face's viewer needs it: row groups of at most 100 MB, page index,
and metadata in the schema that marks the image column.
"""

import json
from collections.abc import Iterator, Sequence
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from sdbatch.job import Output

MOST_ROW_GROUP_BYTES = 100 * 10**6  # the viewer's limit, datasets' MAX_ROW_GROUP_SIZE
_FEATURES = {"info": {"features": {"image": {"_type": "Image"}}}}


def write(rows: pa.Table, output: Output) -> memoryview:
    """Return the rows of one shard as a Parquet file."""
    rows = rows.replace_schema_metadata({"huggingface": json.dumps(_FEATURES)})
    # glibc moves the pages of what grows and returns them at once; Arrow's own pool does neither.
    sink = pa.BufferOutputStream(pa.system_memory_pool())
    # Encoded images do not compress; everything else does.
    compression = dict.fromkeys(_leaves(rows.schema), "zstd") | {"image.bytes": "none"}
    with pq.ParquetWriter(
        sink,
        rows.schema,
        compression=compression,
        write_page_index=True,
        use_dictionary=_dictionary_encoded(rows),
    ) as writer:
        for group in _row_groups(rows):
            # Joined, or the ends of its pages would depend on those of the chunks.
            writer.write_table(group.combine_chunks(), row_group_size=len(group))
    return memoryview(sink.getvalue())


def read(file: IO[bytes], columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """Yield the rows of a shard, a few in memory at a time; None: with all columns."""
    for batch in pq.ParquetFile(file).iter_batches(batch_size=64, columns=columns):
        yield from batch.to_pylist()


def card_features(output: Output) -> dict[str, Any]:
    """Return nothing: the file's own schema says it all."""
    return {}


def _row_groups(rows: pa.Table) -> Iterator[pa.Table]:
    others = rows.drop_columns(["image"]).nbytes // max(1, rows.num_rows)  # of a row, on average
    start = size_so_far = 0
    for at, image in enumerate(rows["image"]):
        size = len(image["bytes"].as_buffer()) + others
        if size_so_far and size_so_far + size > MOST_ROW_GROUP_BYTES:
            yield rows.slice(start, at - start)
            start, size_so_far = at, 0
        size_so_far += size
    yield rows.slice(start)


def _leaves(schema: pa.Schema) -> list[str]:
    sink = pa.BufferOutputStream()
    pq.write_table(schema.empty_table(), sink)
    columns = pq.ParquetFile(pa.BufferReader(sink.getvalue())).schema
    return [columns.column(i).path for i in range(len(columns))]


def _dictionary_encoded(rows: pa.Table) -> list[str]:
    return [
        name for name in _leaves(rows.schema) if not name.startswith("image.") and name != "sha256"
    ]

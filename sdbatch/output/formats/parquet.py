"""A shard as Parquet, as Hugging Face's viewer needs it: row groups of at most 100 MB, page index,
and metadata in the schema that marks the image column.
"""

import json
from collections.abc import Iterator, Sequence
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from sdbatch import schema
from sdbatch.job import Output
from sdbatch.output.plain_values import plain_values
from sdbatch.schema import FEATURE

MOST_ROW_GROUP_BYTES = 100 * 10**6  # the viewer's limit, datasets' MAX_ROW_GROUP_SIZE


def write(rows: pa.Table, output: Output) -> memoryview:
    """Return the rows of one shard as a Parquet file."""
    rows = with_features(rows)
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
        values = [_values(column) for column in batch.columns]
        for row in zip(*values, strict=True):
            yield dict(zip(batch.schema.names, row, strict=True))


def _values(column: pa.Array) -> list[Any]:
    try:
        return list(column.to_pylist())
    except (ValueError, OverflowError, LookupError):  # such as a time after the year 9999
        return plain_values(column)


def with_features(rows: pa.Table) -> pa.Table:
    """Return `rows` with the metadata by which `datasets` knows images, classes and the like."""
    features = {
        field.name: json.loads(field.metadata[FEATURE])
        for field in rows.schema
        if FEATURE in (field.metadata or {})
    }
    image = {schema.IMAGE.name: {"_type": "Image"}}
    metadata = {FEATURE: json.dumps({"info": {"features": {**image, **features}}})}
    fields = [field.remove_metadata() for field in rows.schema]
    return pa.table(rows.columns, schema=pa.schema(fields, metadata))


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


def _leaves(columns: pa.Schema) -> list[str]:
    sink = pa.BufferOutputStream()
    pq.write_table(columns.empty_table(), sink)
    leaves = pq.ParquetFile(pa.BufferReader(sink.getvalue())).schema
    return [leaves.column(i).path for i in range(len(leaves))]


def _dictionary_encoded(rows: pa.Table) -> list[str]:
    return [
        name for name in _leaves(rows.schema) if not name.startswith("image.") and name != "sha256"
    ]

"""A shard as a WebDataset tar: for each image `KEY.jpg`, `KEY.txt` (the prompt), `KEY.json`.

The members of an image stand together; no time, owner or mode differs from run to run.
https://github.com/webdataset/webdataset
"""

import base64
import datetime
import io
import json
import math
import tarfile
from collections.abc import Iterator
from typing import IO, Any

import pyarrow as pa


def write(rows: pa.Table, image_format: str) -> bytes:
    """Return the rows of one shard, with the columns of schema.images, as a tar file."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for batch in rows.to_batches(max_chunksize=64):
            for row in batch.to_pylist():
                image = row.pop("image")["bytes"]
                _add(tar, f"{row['key']}.{image_format}", image)
                _add(
                    tar, f"{row['key']}.json", json.dumps(_plain(row), ensure_ascii=False).encode()
                )
                _add(tar, f"{row['key']}.txt", row["prompt"].encode())
    return file.getvalue()


def read(file: IO[bytes]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a shard, one in memory at a time; `image` is as in Parquet."""
    with tarfile.open(fileobj=file, mode="r|") as tar:
        members: dict[str, bytes] = {}
        for member in tar:
            opened = tar.extractfile(member)
            stem, _, suffix = member.name.partition(".")
            members[suffix] = opened.read() if opened is not None else b""
            if suffix == "txt":  # the last of an image's members
                row = json.loads(members.pop("json"))
                del members["txt"]
                ((suffix, image),) = members.items()
                yield {**row, "key": stem, "image": {"bytes": image, "path": f"{stem}.{suffix}"}}
                members = {}


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _plain(value: Any) -> Any:
    """Return `value` as JSON can hold it: times as ISO 8601, bytes as base64, NaN as null."""
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return str(value)

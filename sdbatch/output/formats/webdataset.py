"""A shard as a WebDataset tar: for each image `KEY.jpg`, `KEY.txt` (the prompt), `KEY.json`.

The members of an image are neighbours; no time, owner or mode differs from run to run.
https://github.com/webdataset/webdataset
"""

import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from typing import IO, Any

import pyarrow as pa

from sdbatch.job import Output
from sdbatch.output.plain_values import plain_rows

AT_A_TIME = 64  # rows that are Python objects at once


def write(rows: pa.Table, output: Output) -> bytes:
    """Return the rows of one shard as a tar file."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        others = plain_rows(rows.drop_columns(["image"]), AT_A_TIME)
        for image, row in zip(rows["image"], others, strict=True):  # one file in memory at a time
            _add(tar, f"{row['key']}.{output.image_format}", image["bytes"].as_py())
            _add(tar, f"{row['key']}.json", json.dumps(row, ensure_ascii=False).encode())
            _add(tar, f"{row['key']}.txt", row["prompt"].encode())
    return file.getvalue()


def read(file: IO[bytes], columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """Yield the rows of a shard, one in memory at a time; `image` and all columns as in Parquet."""
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


def card_features(output: Output) -> dict[str, Any]:
    """Return the types of the members: `datasets` would guess them from five images."""
    names = {"__key__": "string", "__url__": "string", output.image_format: "image"}
    names |= {"json": "json", "txt": "string"}
    features = [{"name": name, "dtype": kind} for name, kind in names.items()]
    return {"dataset_info": {"features": features}}


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))

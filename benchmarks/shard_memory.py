"""The memory that a shard takes on its way: drawing it, a stage after that, and writing it.

    python benchmarks/shard_memory.py [--images 120 --images 256] [--before REVISION]

A shard of 512x512 images of noise as PNG, the largest files that there are. Every stage runs on it
in a process of its own, as in a run: what arrives as a block leaves as a block, or as files in a
local folder. Prints the peak of the process's resident memory above that before the stage, as a
multiple of the bytes of the encoded images. The block that arrives is not counted: in a run it is
in Ray's object store. A stage has worked on a shard of two images before. `sha256` is that of the
shard's file in `data/`, which must not change. A shard with flagged or failed rows is made in the
process of its stage, which may use memory again that this has released: those figures are at least
so large. JSON on the last line.
"""

import asyncio
import gc
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import click
import findings
import numpy as np
import pyarrow as pa
from before_after import ROOT, checked_out
from pipeline import NoLiveness, ReadyEngine, write_table

from sdbatch.batch import pipeline
from sdbatch.batch.blocks import BlockStage, pack, unpack
from sdbatch.batch.drawing_actor import DrawingActor
from sdbatch.batch.metrics import Metrics
from sdbatch.batch.pipeline import Ready
from sdbatch.cores import cores
from sdbatch.job import Job, parse
from sdbatch.output import identity, lease
from sdbatch.output.image_file import encoding_of
from sdbatch.output.receipts import Writer
from sdbatch.stages.base import facts_of, replace_columns, shard_of, with_shard
from sdbatch.stages.draw import DrawImages
from sdbatch.stages.read import ReadPrompts
from sdbatch.stages.safety import ApplySafety, SafetyPolicy
from sdbatch.stages.write import WriteShard

SIDE = 512  # pixels
EVERY = 16  # row that is flagged, or has failed
Step = Callable[[pa.Table], pa.Table]  # from block to block


def job(folder: Path, images: int, step: str) -> Job:
    """Return the job over the table in `folder`: a shard of `images`, and one of two."""
    return parse(
        {
            "prompts": {"path": str(folder / "table.parquet")},
            "model": "builtin:shapes",
            "sampling": {"height": SIDE, "width": SIDE},
            "output": {
                "path": str(folder / step),
                "format": STEPS[step][1],
                "image_format": "png",
                "images_per_shard": images,
            },
        }
    )


def draw(ready: Ready) -> Step:
    """Return the drawing of a row of the plan, with an engine whose image is ready."""
    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    planned = ready.plan.job
    read = BlockStage(ReadPrompts(planned, ready.plan.table), Metrics())
    stage = DrawImages(partial(ReadyEngine, noise), encoding_of(planned))
    actor = DrawingActor(stage, NoLiveness(), Metrics())
    loop = asyncio.new_event_loop()
    return lambda block: loop.run_until_complete(actor(read(block)))


def safety(ready: Ready) -> Step:
    """Return the stage that replaces flagged images."""
    return BlockStage(ApplySafety(SafetyPolicy("blank"), encoding_of(ready.plan.job)), Metrics())


def write(ready: Ready) -> Step:
    """Return the writing to a local folder."""
    output = ready.plan.job.output
    fingerprint = identity.fingerprint(ready.plan.job, identity.versions())
    return BlockStage(WriteShard(output, Writer(lease.take(ready.store), fingerprint)), Metrics())


def flagged(rows: pa.Table) -> pa.Table:
    """Return a shard in which every sixteenth image is flagged."""
    flags = [index % EVERY == 0 for index in range(rows.num_rows)]
    return replace_columns(rows, {"nsfw": pa.array(flags)})


def failed(rows: pa.Table) -> pa.Table:
    """Return a shard in which every sixteenth row has failed."""
    errors = [None if index % EVERY else "a reason" for index in range(rows.num_rows)]
    return replace_columns(rows, {"error": pa.array(errors, pa.string())})


STEPS: dict[str, tuple[Callable[[Ready], Step], str, Callable[[pa.Table], pa.Table] | None]] = {
    "draw": (draw, "parquet", None),
    "safety, 1 of 16 flagged": (safety, "parquet", flagged),
    "write parquet": (write, "parquet", None),
    "write webdataset": (write, "webdataset", None),
    "write parquet, 1 of 16 failed": (write, "parquet", failed),
    "write webdataset, 1 of 16 failed": (write, "webdataset", failed),
}


def measure(name: str, folder: Path, images: int) -> dict[str, Any]:
    """Run a step on the small shard, then on the large one; return the peak of the second."""
    make, _, change = STEPS[name]
    ready = pipeline.prepare(job(folder, images, name))
    large, small = (_block(ready, name, folder, number, change) for number in (0, 1))
    step = make(ready)
    _keep(step(small), folder, 1)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak becomes the present: proc(5)
    before, began = _mib("VmRSS"), time.perf_counter()
    result = step(large)
    seconds, peak = time.perf_counter() - began, _mib("VmHWM")
    _keep(result, folder, 0)
    files = sorted(Path(ready.store.path("data")).glob("000000.*"))
    encoded = sum(len(image["bytes"].as_buffer()) for image in _images(folder)) / 2**20
    return {
        "encoded_mib": round(encoded, 1),
        "peak_mib": round(peak - before, 1),
        "multiple": round((peak - before) / encoded, 2),
        "seconds": round(seconds, 2),
        "sha256": hashlib.sha256(files[0].read_bytes()).hexdigest()[:16] if files else "",
    }


def _block(ready: Ready, name: str, folder: Path, number: int, change: Any) -> pa.Table:
    """Return what a step gets: a row of the plan, or a block that drawing has left, changed."""
    if name == "draw":
        shard = ready.plan.shards[number]
        return pa.Table.from_pylist([{**asdict(shard), "url": ready.plan.urls()[shard.source]}])
    with pa.OSFile(str(folder / f"{number}.arrow")) as file:
        block = pa.ipc.open_stream(file).read_all()
    if change is None:
        return block
    rows = unpack(block)
    return pack(with_shard(change(rows), shard_of(rows), facts_of(rows)))


def _keep(block: pa.Table, folder: Path, number: int) -> None:
    """Write the first block of a shard to a file, for the steps that follow."""
    path = folder / f"{number}.arrow"
    if not path.exists():
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, block.schema) as stream:
            stream.write_table(block)


def _images(folder: Path) -> pa.ChunkedArray:
    with pa.memory_map(str(folder / "0.arrow")) as file:
        return unpack(pa.ipc.open_stream(file).read_all())["image"]


def _mib(name: str) -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0]) / 1024


@click.command()
@click.option(
    "--images", "counts", multiple=True, default=(120, 256, 340), show_default=True, help="A shard."
)
@click.option("--before", help="A commit of this repository, whose code is measured, too.")
@click.option("--output", type=click.Path(path_type=Path), help="Where .json and .md go.")
@click.option("--part", type=(str, str), hidden=True)  # step and folder: a process for each step
def main(
    counts: tuple[int, ...],
    before: str | None,
    output: Path | None,
    part: tuple[str, str] | None,
) -> None:
    """Measure the memory of each stage over one shard."""
    if part:
        print(json.dumps(measure(part[0], Path(part[1]), *counts)))
        return
    result = findings.Findings(output)
    libraries = {name: findings.versions()[name] for name in ("sdbatch", "pyarrow", "pillow")}
    result.add("on", {"date": time.strftime("%Y-%m-%d"), "cores": cores(), **libraries})
    for images in counts:
        result.add(f"a shard of {images} images", measure_all(images, ROOT))
    if before:
        with checked_out(before) as state:
            for images in counts:
                result.add(f"{images} images, {before}", measure_all(images, state))
    print(json.dumps(result.values))


def measure_all(images: int, state: Path) -> dict[str, Any]:
    """Return the memory of each step with the code in `state`, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(state)}
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_table(Path(folder) / "table.parquet", images + 2)
        for name in STEPS:
            command = [sys.executable, __file__, "--images", str(images), "--part", name, folder]
            done = subprocess.run(
                command, env=environment, stdout=subprocess.PIPE, text=True, check=True
            )
            rows[name] = json.loads(done.stdout.splitlines()[-1])
    return rows


if __name__ == "__main__":
    main()

"""The memory of the reader and of a drawing process over photos of 12 megapixels: it must be flat.

    python benchmarks/photos.py [--photos 1000] [--side 512]

The table names the photos as files, holds them in a column of Parquet, or in a WebDataset tar. For
each, a process reads all shards one after the other, as Ray's tasks do, and another one draws them,
with an engine that holds the requests of a whole shard and then returns their pictures. Rows of
`part` cut the surroundings of a mask out of the photo and put them back, so whole photos travel.
Printed is the resident memory above that at the start: the most after a shard of the first half of
the table and of the second half, and the peak. Memory that does not grow has equal halves. The
photos are a few pictures in files that differ. JSON on the last line.
"""

import asyncio
import gc
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import click
import findings
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from pipeline import NoLiveness
from shard_memory import _mib

from sdbatch.batch.blocks import BlockStage, unpack
from sdbatch.batch.drawing_actor import DrawingActor
from sdbatch.batch.metrics import Metrics
from sdbatch.cores import cores
from sdbatch.engine.request import Drawn, Follow, Request, Usage
from sdbatch.job import Job, parse
from sdbatch.output.image_file import encoding_of
from sdbatch.output.plan import Plan, make_plan
from sdbatch.prompts.table import open_table
from sdbatch.stages.draw import DrawImages
from sdbatch.stages.read import ReadPrompts

WIDTH, HEIGHT = 4000, 3000  # 12 megapixels
PICTURES = 4  # different ones
ROW_GROUP = 100  # rows, as `datasets` writes columns of images
WAYS = ("files", "parquet", "tar", "part")


class HoldingEngine:
    """Returns the pictures of requests, but not before it holds so many."""

    stalled_seconds = 0.0
    device: Mapping[str, Any] = MappingProxyType({})

    def __init__(self) -> None:
        self.usage = Usage()
        self.shard = 0  # images of a shard
        self._held: list[tuple[Request, Future[Drawn]]] = []

    def submit(
        self, request: Request, *, exact: bool = True, follow: Follow | None = None
    ) -> Future[Drawn]:
        """Hold a request; return all if there are as many as in the shard."""
        future: Future[Drawn] = Future()
        self._held.append((request, future))
        if len(self._held) == self.shard:
            held, self._held = self._held, []
            for each, waiting in held:
                image = 255 - each.inputs["image"]
                waiting.set_result(
                    Drawn(image=image, prompt_tokens=1, prompt_truncated=False, lanes=2)
                )
        return future


def photographs() -> list[bytes]:
    """Return pictures like photos: soft shapes with grain, as JPEG of some 5 MB."""
    found = []
    for seed in range(PICTURES):
        noise = np.random.default_rng(seed)
        small = Image.fromarray(noise.integers(0, 256, (30, 40, 3), np.uint8))
        soft = np.asarray(small.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), np.int16)
        grain = noise.integers(-12, 13, (HEIGHT, WIDTH, 1), np.int16)
        file = io.BytesIO()
        picture = Image.fromarray(np.clip(soft + grain, 0, 255).astype(np.uint8))
        picture.save(file, "JPEG", quality=90)
        found.append(file.getvalue())
    return found


def write_tables(folder: Path, photos: int) -> None:
    """Write the photos in each way, and a mask of their middle."""
    pictures = photographs()
    (folder / "photos").mkdir()
    names = [f"photos/{number:04d}.jpg" for number in range(photos)]
    prompts = [f"photo {number}" for number in range(photos)]
    mask = np.zeros((HEIGHT // 10, WIDTH // 10), np.uint8)
    mask[HEIGHT // 30 : HEIGHT // 15, WIDTH // 30 : WIDTH // 15] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = pa.schema([("prompt", pa.string()), ("image", image)])
    with (
        pq.ParquetWriter(folder / "parquet.parquet", columns) as parquet,
        tarfile.open(folder / "tar.tar", "w") as tar,
    ):
        rows: list[dict[str, Any]] = []
        for number, (name, prompt) in enumerate(zip(names, prompts, strict=True)):
            file = pictures[number % PICTURES] + str(number).encode()  # after the picture's end
            (folder / name).write_bytes(file)
            for member, data in (
                (f"{number:04d}.txt", prompt.encode()),
                (f"{number:04d}.jpg", file),
            ):
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            rows.append({"prompt": prompt, "image": {"bytes": file, "path": name}})
            if len(rows) == ROW_GROUP or number == photos - 1:
                parquet.write_table(pa.Table.from_pylist(rows, columns))
                rows = []
    table = pa.table({"prompt": prompts, "image": names})
    pq.write_table(table, folder / "files.parquet")
    masked = table.append_column("mask_image", pa.array(["mask.png"] * photos))
    pq.write_table(masked, folder / "part.parquet")


def job_of(folder: Path, way: str, side: int) -> Job:
    """Return the job over a table."""
    suffix = "tar" if way == "tar" else "parquet"
    return parse(
        {
            "prompts": {"path": str(folder / f"{way}.{suffix}")},
            "model": "builtin:shapes",
            "sampling": {"height": side, "width": side, "only_masked": way == "part"},
            "output": {"path": str(folder / "out")},
        }
    )


def measure(step: str, way: str, folder: Path, side: int) -> dict[str, Any]:
    """Read or draw all shards in this process; return its memory above that at the start."""
    job = job_of(folder, way, side)
    plan = make_plan(job, open_table(job.prompts), None)
    run = {"read": read_shards, "draw": draw_shards}[step]
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak becomes the present: proc(5)
    before, began = _mib("VmRSS"), time.perf_counter()
    after = [round(_mib("VmRSS") - before, 1) for _ in run(plan, folder / way)]
    half = (len(after) + 1) // 2
    return {
        "shards": len(plan.shards),
        "images_per_shard": plan.images_per_shard,
        "first_half_mib": max(after[:half]),
        "second_half_mib": max(after[half:], default=None),
        "peak_mib": round(_mib("VmHWM") - before, 1),
        "ms_a_photo": round(1000 * (time.perf_counter() - began) / plan.images, 1),
    }


def read_shards(plan: Plan, blocks: Path) -> Any:
    """Read each shard and keep its block in a file; yield after each."""
    blocks.mkdir()
    read = BlockStage(ReadPrompts(plan.job, plan.table), Metrics())
    for shard in plan.shards:
        planned = {**asdict(shard), "url": plan.urls()[shard.source]}
        block = read(pa.Table.from_pylist([planned]))
        failed = [error for error in unpack(block)["error"].to_pylist() if error]
        if failed:
            raise SystemExit(f"a row of the benchmark fails: {failed[0]}")
        path = str(blocks / f"{shard.shard}.arrow")
        with pa.OSFile(path, "wb") as file, pa.ipc.new_stream(file, block.schema) as stream:
            stream.write_table(block)
        del block
        yield


def draw_shards(plan: Plan, blocks: Path) -> Any:
    """Draw each shard from the block in its file; yield after each."""
    engine = HoldingEngine()
    stage = DrawImages(lambda: engine, encoding_of(plan.job))
    actor = DrawingActor(stage, NoLiveness(), Metrics())
    with asyncio.Runner() as runner:
        for shard in plan.shards:
            engine.shard = shard.images
            with pa.memory_map(str(blocks / f"{shard.shard}.arrow")) as file:
                block = pa.ipc.open_stream(file).read_all()
                runner.run(actor(block))
            del block
            yield


@click.command()
@click.option("--photos", default=1000, show_default=True, help="Of the table.")
@click.option("--side", default=512, show_default=True, help="Of the images, in pixels.")
@click.option("--output", type=click.Path(path_type=Path), help="Where .json and .md go.")
@click.option("--part", type=(str, str, str), hidden=True)  # a process for each: step, way, folder
def main(photos: int, side: int, output: Path | None, part: tuple[str, str, str] | None) -> None:
    """Measure the memory over many photos."""
    if part:
        print(json.dumps(measure(part[0], part[1], Path(part[2]), side)))
        return
    result = findings.Findings(output)
    libraries = {name: findings.versions()[name] for name in ("sdbatch", "pyarrow", "pillow")}
    result.add("on", {"date": time.strftime("%Y-%m-%d"), "cores": cores(), **libraries})
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_tables(Path(folder), photos)
        for way in WAYS:
            for step in ("read", "draw"):
                command = [sys.executable, __file__, "--side", str(side)]
                command += ["--part", step, way, folder]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                rows[f"{step}, {way}"] = json.loads(done.stdout.splitlines()[-1])
    result.add(f"{photos} photos of {WIDTH}x{HEIGHT}, drawn at {side}x{side}", rows)
    print(json.dumps(result.values))


if __name__ == "__main__":
    main()

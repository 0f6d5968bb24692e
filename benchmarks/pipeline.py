"""The cost of the pipeline around the engine: an engine that draws nothing, and a bare loop.

    python benchmarks/pipeline.py [--images 10000] [--repeats 3]

Both write the same 512x512 images as JPEG into Parquet shards of 250 on two cores: sdbatch from a
prompt table through Ray, with an engine that returns a ready image; and one process that encodes
and writes in two threads, and does nothing else. Then the driver's memory for 10,000 to 1,000,000
planned images. Prints a table and, on the last line, JSON.

    python benchmarks/pipeline.py --growth 100000

draws as many images of 64x64 in one run, and prints the memory of the driver and of every drawing
actor as the run goes on.
"""

import asyncio
import hashlib
import io
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import click
import findings
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from sdbatch.batch import pipeline
from sdbatch.batch.blocks import BlockStage
from sdbatch.batch.drawing_actor import DrawingActor
from sdbatch.batch.liveness import LivenessClient
from sdbatch.batch.metrics import Metrics
from sdbatch.engine.request import Drawn, Follow, Request, Usage
from sdbatch.job import Job, parse
from sdbatch.output import identity, lease
from sdbatch.output.image_file import encoding_of
from sdbatch.output.progress import Progress
from sdbatch.output.receipts import Writer
from sdbatch.report.progress import SilentDisplay
from sdbatch.stages.draw import DrawImages
from sdbatch.stages.read import ReadPrompts
from sdbatch.stages.write import WriteShard

SIDE = 512  # pixels
SMALL = 64  # pixels, where only the number of images counts
SHARD = 250  # images
ACTORS = 2
MEMORY_SECONDS = 8.0  # of drawing, before the driver's peak memory is read
PERCENTS = (10, 25, 50, 75, 100)  # of a run, at which memory is read


def picture() -> NDArray[np.uint8]:
    """Return a picture that is as hard to encode as a photograph: waves and some noise."""
    y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    waves = np.stack([np.sin(9 * x + k) * np.cos(7 * y - k) for k in range(3)], axis=-1)
    noise = np.random.default_rng(0).normal(0, 6, (SIDE, SIDE, 3))
    return np.clip(128 + 90 * waves + noise, 0, 255).astype(np.uint8)


class ReadyEngine:
    """An engine whose image is ready before it is requested; default: `picture`."""

    stalled_seconds = 0.0
    device: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, image: NDArray[np.uint8] | None = None) -> None:
        self.usage = Usage()
        image = picture() if image is None else image
        self._drawn = Drawn(image=image, prompt_tokens=5, prompt_truncated=False, lanes=2)

    def submit(
        self, request: Request, *, exact: bool = True, follow: Follow | None = None
    ) -> Future[Drawn]:
        """Return the ready image."""
        self.usage.ticks += 1
        future: Future[Drawn] = Future()
        future.set_result(self._drawn)
        return future


class TimeLimit(SilentDisplay):
    """Interrupts the run, as Ctrl-C does, some seconds after its first image."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._end: float | None = None

    def show(self, progress: Progress) -> None:
        """Interrupt the run when its time is over."""
        if progress.done and self._end is None:
            self._end = time.monotonic() + self._seconds
        if self._end is not None and time.monotonic() > self._end:
            self._end = float("inf")
            raise KeyboardInterrupt


class MemoryGauge(SilentDisplay):
    """Reads the memory of the driver and of the drawing actors at PERCENTS of the images."""

    def __init__(self) -> None:
        self.readings: dict[str, dict[str, float]] = {}

    def show(self, progress: Progress) -> None:
        """Take a reading if one is due; the last one when the last image is drawn."""
        due = [percent for percent in PERCENTS if 100 * progress.done >= percent * progress.planned]
        if due and (name := f"{due[-1]} %") not in self.readings:
            self.readings[name] = {"driver": mib(os.getpid()), **actors_memory()}


def actors_memory() -> dict[str, float]:
    """Return the MiB of each drawing actor of this run, in the order of their process ids."""
    pids = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
            if b"DrawingActor" in command and os.getpid() in ancestors(int(process.name)):
                pids.append(int(process.name))
        except OSError:
            continue  # it has ended meanwhile
    return {f"actor {at}": mib(pid) for at, pid in enumerate(sorted(pids), start=1)}


def ancestors(pid: int) -> set[int]:
    """Return the processes that started a process, and those that started them."""
    found: set[int] = set()
    while pid > 1:
        status = Path(f"/proc/{pid}/status").read_text()
        pid = int(status.split("PPid:")[1].split()[0])
        found.add(pid)
    return found


def mib(pid: int) -> float:
    """Return the resident memory of a process without what it shares, such as Ray's store."""
    status = Path(f"/proc/{pid}/status").read_text()
    return round(int(status.split("RssAnon:")[1].split()[0]) / 1024, 1)


def job(table: Path, output: Path, size: int, side: int = SIDE) -> Job:
    """Return the job over `table`."""
    return parse(
        {
            "prompts": {"path": str(table)},
            "model": "builtin:shapes",
            "sampling": {"height": side, "width": side},
            "cluster": {"actors": ACTORS},
            "output": {"path": str(output), "images_per_shard": size},
        }
    )


def write_table(path: Path, rows: int) -> None:
    """Write a prompt table of `rows` short rows in one Parquet file."""
    prompts = pa.array([f"a photograph of a dog, number {i}" for i in range(rows)])
    pq.write_table(pa.table({"prompt": prompts}), path)


def through_the_pipeline(folder: Path, images: int) -> tuple[float, float]:
    """Return sdbatch's images/s while it draws, and those of the whole run with Ray's start."""
    report = pipeline.draw(
        pipeline.prepare(job(folder / "table.parquet", folder / "out", SHARD)),
        display=SilentDisplay(),
        make_engine=ReadyEngine,
    )
    assert report.images == images, report
    return report.images_per_s, images / report.seconds


def bare(folder: Path, images: int) -> float:
    """Return the images/s of encoding and writing alone, in two threads of one process."""
    image = picture()

    def encode(_: int) -> bytes:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=95)
        return file.getvalue()

    def write(start: int) -> None:
        files = [encode(i) for i in range(start, start + SHARD)]
        table = pa.table({"image": files, "sha256": [hashlib.sha256(f).hexdigest() for f in files]})
        with (folder / f"bare-{start}.parquet").open("wb") as file:
            pq.write_table(table, file, compression="none")
            file.flush()
            os.fsync(file.fileno())

    began = time.perf_counter()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, range(0, images, SHARD)))
    return images / (time.perf_counter() - began)


class NoLiveness(LivenessClient):
    """The liveness of a run without Ray: reports go nowhere."""

    def __init__(self) -> None:
        super().__init__(None)

    def loading(self) -> None:
        """Report nothing."""

    loaded = loading

    async def deaths(self, shard: int) -> int:
        """Return that nothing died."""
        return 0

    async def wait_until_open(self) -> None:
        """Let drawing begin at once."""

    async def begin(self, shard: int) -> int:
        """Return that it is the first attempt."""
        return 1

    async def beat(self, shard: int, drawn: int, failed: int, ticks: int) -> bool:
        """Return that the run goes on."""
        return True

    async def end(self, shard: int, drawn: int, failed: int) -> None:
        """Report nothing."""


def stages_by_hand(folder: Path, images: int) -> dict[str, float]:
    """Return each stage's milliseconds of one core an image, without Ray."""
    ready = pipeline.prepare(job(folder / "table.parquet", folder / "by-hand", SHARD))
    planned, metrics = ready.plan.job, Metrics()
    read = BlockStage(ReadPrompts(planned, ready.plan.table), metrics)
    draw = DrawingActor(DrawImages(ReadyEngine, encoding_of(planned)), NoLiveness(), metrics)
    fingerprint = identity.fingerprint(planned, identity.versions())
    writer = Writer(lease.take(ready.store), fingerprint)
    write = BlockStage(WriteShard(planned.output, writer), metrics)
    urls = ready.plan.urls()
    spent = {"read": 0.0, "draw": 0.0, "write": 0.0}
    loop = asyncio.new_event_loop()
    shards = ready.plan.shards[: images // SHARD]
    for shard in shards:
        block = pa.Table.from_pylist([{**asdict(shard), "url": urls[shard.source]}])
        began = time.process_time()
        block = read(block)
        spent["read"] += time.process_time() - began
        began = time.process_time()
        block = loop.run_until_complete(draw(block))
        spent["draw"] += time.process_time() - began
        began = time.process_time()
        write(block)
        spent["write"] += time.process_time() - began
    return {name: round(1000 * s / (len(shards) * SHARD), 3) for name, s in spent.items()}


def driver_memory(images: int, size: int) -> float:
    """Return the driver's peak MiB for a plan of `images`, some of which are drawn."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_table(folder / "table.parquet", images)
        ready = pipeline.prepare(job(folder / "table.parquet", folder / "out", size))
        pipeline.draw(ready, display=TimeLimit(MEMORY_SECONDS), make_engine=ReadyEngine)
    status = Path("/proc/self/status").read_text()  # ru_maxrss would be the parent's at the fork
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def growth(images: int) -> dict[str, dict[str, float]]:
    """Return the memory of the driver and the actors as a run of `images` small images goes on."""
    gauge = MemoryGauge()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_table(folder / "table.parquet", images)
        ready = pipeline.prepare(job(folder / "table.parquet", folder / "out", SHARD, SMALL))
        image = np.ascontiguousarray(picture()[:SMALL, :SMALL])
        report = pipeline.draw(ready, display=gauge, make_engine=partial(ReadyEngine, image))
    assert report.images == images, report
    return gauge.readings


@click.command()
@click.option("--images", default=10_000, help="Per run of either kind.")
@click.option("--repeats", default=3)
@click.option("--memory", type=(int, int), help="Print the driver's MiB for IMAGES in shards of N.")
@click.option("--growth", "grown", type=int, help="Print the memory over one run of N images.")
@click.option("--output", type=click.Path(path_type=Path), help="Write the JSON here, too.")
def main(
    images: int,
    repeats: int,
    memory: tuple[int, int] | None,
    grown: int | None,
    output: Path | None,
) -> None:
    """Measure the pipeline around an engine that draws nothing."""
    if grown:
        readings = growth(grown)
        for name, reading in readings.items():
            print(
                f"{name:6}",
                *(f"{process} {value:7.1f} MiB  " for process, value in reading.items()),
            )
        findings.report(output, images=grown, shard=SHARD, mib=readings)
        return
    if memory:
        print(driver_memory(*memory))
        return
    found: dict[str, list[float]] = {"pipeline": [], "pipeline_with_start": [], "bare": []}
    for _ in range(repeats):  # one after the other, so that both see the same machine
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_table(folder / "table.parquet", images)
            found["bare"].append(bare(folder, images))
            drawing, whole = through_the_pipeline(folder, images)
            found["pipeline"].append(drawing)
            found["pipeline_with_start"].append(whole)
            by_hand = stages_by_hand(folder, 1000)
    medians = {name: round(statistics.median(values), 1) for name, values in found.items()}
    sizes = [(10_000, 1000), (100_000, 1000), (1_000_000, 1000), (100_000, 100)]
    memories = {f"{n:,} images, {n // size:,} shards": _memory_of(n, size) for n, size in sizes}
    share = round(medians["pipeline"] / medians["bare"], 3)
    core_ms = {**by_hand, "bare": round(2000 / medians["bare"], 3)}
    for name, value in medians.items():
        print(f"{name:22} {value:8.1f} images/s")
    print(f"{'of the bare loop':22} {share:8.3f}")
    for name, value in core_ms.items():
        print(f"{name:22} {value:8.3f} ms of a core an image")
    for name, value in memories.items():
        print(f"{name:34} {value:6.0f} MiB driver")
    findings.report(
        output,
        images=images,
        repeats=repeats,
        images_per_s=medians,
        of_the_bare_loop=share,
        core_ms_an_image=core_ms,
        driver_mib=memories,
    )


def _memory_of(images: int, size: int) -> float:
    command = [sys.executable, __file__, "--memory", str(images), str(size)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return round(float(done.stdout.splitlines()[-1]), 1)


if __name__ == "__main__":
    main()

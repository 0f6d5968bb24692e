"""Weak scaling: 1 to 16 actors whose engine sleeps as long as a GPU would take.

    python benchmarks/scaling.py [--actors 1 --actors 2 ...] [--output benchmarks/results/scaling]

Each engine gets the same work: 16 images take 1.6 s, as on a GPU with 10 images/s, and it only
sleeps, so that two cores are enough for 16 engines. All else is real: Ray, the prompt table,
512x512 images as JPEG, Parquet shards on the disk. The figures come from the engines' own clocks.
Prints a table and, on the last line, JSON; draws the curve.

- efficiency: images/s of each actor, from the moment when all of them draw to the moment when the
  first has no more work, as a part of the same with one actor.
- tail: idle part of the actors' time, from the first image to the last.
- start: seconds from the command to the first batch of the last actor.
"""

import json
import os
import tempfile
import threading
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import click
import findings
from pipeline import picture, write_table

from sdbatch.batch import pipeline
from sdbatch.engine.request import Drawn, Follow, Request, Usage
from sdbatch.job import Job, parse
from sdbatch.report.progress import SilentDisplay

IMAGES_PER_SECOND = 10.0  # of one GPU
BATCH = 16  # images that an engine draws at a time
SHARD = 50  # images
SHARDS = 24  # an actor


class SleepingEngine:
    """Draws BATCH images at a time by sleeping; records the times in a file of its own."""

    stalled_seconds = 0.0
    device: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, folder: str) -> None:
        self.usage = Usage()
        self._image = Drawn(image=picture(), prompt_tokens=5, prompt_truncated=False, lanes=2)
        self._file = Path(folder) / f"{os.getpid()}.jsonl"
        self._waiting: deque[Future[Drawn]] = deque()
        self._changed = threading.Condition()
        self._began = time.perf_counter()
        threading.Thread(target=self._run, daemon=True).start()

    def submit(
        self, request: Request, *, exact: bool = True, follow: Follow | None = None
    ) -> Future[Drawn]:
        """Queue a request."""
        future: Future[Drawn] = Future()
        with self._changed:
            self._waiting.append(future)
            self._changed.notify()
        return future

    def _run(self) -> None:
        while True:
            idle = time.perf_counter()
            with self._changed:
                while not self._waiting:
                    self._changed.wait()
                batch = [self._waiting.popleft() for _ in range(min(BATCH, len(self._waiting)))]
            now, usage = time.perf_counter(), self.usage
            began = time.time()
            time.sleep(len(batch) / IMAGES_PER_SECOND)
            self.usage = replace(
                usage,
                seconds=time.perf_counter() - self._began,
                idle_seconds=usage.idle_seconds + now - idle,
                ticks=usage.ticks + 1,
                rows=usage.rows + 2 * BATCH,
                filled=usage.filled + 2 * len(batch),
            )
            with self._file.open("a") as file:
                file.write(json.dumps([began, time.time(), len(batch)]) + "\n")
            for future in batch:
                future.set_result(self._image)


@dataclass(frozen=True)
class Run:
    """The clocks of `actors` engines. Seconds are from the start of the command."""

    actors: int
    images_per_s: float  # while all of them draw
    whole_images_per_s: float  # from the first image to the last
    start: float
    tail: float
    seconds: float  # to the last image
    busy: list[tuple[float, int]]  # second -> engines that draw


def run(actors: int, folder: Path) -> Run:
    """Draw SHARDS shards for each actor; return the clocks of the engines."""
    clocks = folder / "clocks"
    clocks.mkdir()
    images = actors * SHARDS * SHARD
    write_table(folder / "table.parquet", images)
    began = time.time()
    report = pipeline.draw(
        pipeline.prepare(job(folder, actors)),
        display=SilentDisplay(),
        make_engine=partial(SleepingEngine, str(clocks)),
    )
    if report.images != images:
        raise RuntimeError(f"{report.images} images of {images}: {report.stopped}")
    each = [
        [(a - began, b - began, count) for a, b, count in map(json.loads, file.open())]
        for file in clocks.iterdir()
    ]
    if len(each) != actors:
        raise RuntimeError(f"{len(each)} actors drew, not {actors}")
    all_draw = max(batches[0][0] for batches in each)
    one_is_done = min(batches[-1][1] for batches in each)
    first = min(batches[0][0] for batches in each)
    last = max(batches[-1][1] for batches in each)
    counted = sum(_within(batch, all_draw, one_is_done) for batches in each for batch in batches)
    return Run(
        actors=actors,
        images_per_s=round(counted / (one_is_done - all_draw), 3),
        whole_images_per_s=round(images / (last - first), 3),
        start=round(all_draw, 2),
        tail=round(sum(last - batches[-1][1] for batches in each) / (actors * (last - first)), 4),
        seconds=round(last, 2),
        busy=[(second, _drawing(each, second)) for second in range(int(last) + 2)],
    )


def job(folder: Path, actors: int) -> Job:
    """Return the job over the table in `folder`."""
    return parse(
        {
            "prompts": {"path": str(folder / "table.parquet")},
            "model": "builtin:shapes",
            "sampling": {"height": 512, "width": 512},
            "engine": {"lanes": 2 * BATCH},
            "cluster": {"actors": actors, "cpus_per_actor": 0.1},
            "output": {"path": str(folder / "out"), "images_per_shard": SHARD},
        }
    )


Batch = tuple[float, float, int]  # began, ended, images


def _within(batch: Batch, start: float, end: float) -> float:
    """Return how many images of a batch were drawn between two moments, in parts at its ends."""
    began, ended, count = batch
    return count * max(0.0, min(ended, end) - max(began, start)) / (ended - began)


def _drawing(each: list[list[Batch]], second: float) -> int:
    return sum(any(a <= second < b for a, b, _ in batches) for batches in each)


def plot(runs: list[Run], efficiency: list[float], path: Path) -> None:
    """Draw the curve, and how many engines drew at each moment of the largest run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (curve, course) = plt.subplots(1, 2, figsize=(10, 3.6))
    counts = [r.actors for r in runs]
    curve.plot(counts, efficiency, "o-", label="while all draw")
    whole = [r.whole_images_per_s / r.actors / IMAGES_PER_SECOND for r in runs]
    curve.plot(counts, whole, "s--", label="first image to last, tail included")
    curve.axhline(0.97, color="grey", linewidth=0.8)
    curve.set(xscale="log", xticks=counts, xticklabels=counts, ylim=(0, 1.05))
    curve.set(xlabel="actors", ylabel="efficiency")
    curve.minorticks_off()
    curve.legend(loc="lower left")
    course.step(*zip(*runs[-1].busy, strict=True), where="post")
    course.set(xlabel="seconds from the command", ylabel=f"engines that draw, of {counts[-1]}")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


@click.command()
@click.option("--actors", multiple=True, type=int, default=(1, 2, 4, 8, 16), show_default=True)
@click.option("--output", type=click.Path(path_type=Path), help="Where .json and .png go.")
def main(actors: tuple[int, ...], output: Path | None) -> None:
    """Measure weak scaling with engines that sleep."""
    runs = []
    print("actors  images/s  efficiency  whole  tail idle  start s")
    for count in actors:
        with tempfile.TemporaryDirectory() as name:
            runs.append(run(count, Path(name)))
        r, one = runs[-1], runs[0]
        efficiency = r.images_per_s / r.actors / (one.images_per_s / one.actors)
        whole = r.whole_images_per_s / r.actors / IMAGES_PER_SECOND
        print(
            f"{r.actors:6}  {r.images_per_s:8.2f}  {efficiency:10.3f}  {whole:5.3f}  {r.tail:9.3f}"
            f"  {r.start:7.1f}",
            flush=True,
        )
    one = runs[0]
    efficiencies = [
        round(r.images_per_s / r.actors / (one.images_per_s / one.actors), 4) for r in runs
    ]
    if output:
        plot(runs, efficiencies, output.with_suffix(".png"))
    findings.report(
        output.with_suffix(".json") if output else None,
        engine=f"sleeps: {BATCH} images at a time, {IMAGES_PER_SECOND:g} images/s",
        shards_an_actor=SHARDS,
        images_a_shard=SHARD,
        efficiency=dict(zip(map(str, actors), efficiencies, strict=True)),
        runs=[{k: v for k, v in asdict(r).items() if k != "busy"} for r in runs],
    )


if __name__ == "__main__":
    main()

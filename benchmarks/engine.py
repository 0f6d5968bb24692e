"""The bare engine against diffusers' StableDiffusionPipeline at its best batch size, on a CPU.

    python benchmarks/engine.py [--model tiny] [--requests 160] [--repeats 3] [--lanes 32]

Both draw the same requests in turns, with the same random weights (benchmarks/models.py) in NHWC,
in one thread: (a) requests that are all alike, and (b) requests whose steps (10 to 50), samplers
(four) and guidance (off for a third) vary, which diffusers gets sorted into equal groups.
Prints a table and, on the last line, JSON.
"""

import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import click
import models
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from findings import report
from oracle import pipeline
from sides import draw_alike

from sdbatch.engine.engine import Engine
from sdbatch.engine.request import Request
from sdbatch.models.build import Build
from sdbatch.models.sd1.family import StableDiffusion1
from sdbatch.models.sd1.loading import Model, assemble

SAMPLERS = ("ddim", "euler", "dpmpp_2m", "unipc")
BATCHES = (1, 4, 8, 16, 32)


def uniform(count: int, pixels: int, steps: int = 20) -> list[Request]:
    """Return requests that differ in prompt and seed alone."""
    return [
        Request(
            prompt=f"a photograph of a dog, number {i}",
            seed=i,
            sampler="dpmpp_2m",
            num_inference_steps=steps,
            guidance_scale=7.5,
            height=pixels,
            width=pixels,
        )
        for i in range(count)
    ]


def mixed(count: int, pixels: int) -> list[Request]:
    """Return requests whose steps, sampler and guidance vary."""
    draw = random.Random(0)
    return [
        Request(
            prompt=f"a photograph of a dog, number {i}",
            seed=i,
            sampler=draw.choice(SAMPLERS),
            num_inference_steps=draw.randint(10, 50),
            guidance_scale=1.0 if draw.random() < 1 / 3 else 7.5,
            height=pixels,
            width=pixels,
        )
        for i in range(count)
    ]


def groups(requests: list[Request], most: int) -> Iterator[list[Request]]:
    """Yield batches of up to `most` requests with equal parameters, as diffusers needs them."""
    alike: dict[Any, list[Request]] = {}
    for request in requests:
        kind = (request.sampler, request.num_inference_steps, request.guidance_scale)
        alike.setdefault(kind, []).append(request)
    for group in alike.values():
        for start in range(0, len(group), most):
            yield group[start : start + most]


def draw_with_diffusers(
    pipe: StableDiffusionPipeline, model: Model, requests: list[Request], most: int
) -> None:
    """Draw all requests with diffusers in batches of up to `most`."""
    for group in groups(requests, most):
        draw_alike(pipe, model, group)


@dataclass
class EngineTimes:
    """Where an engine's seconds went."""

    unet: float = 0.0
    decode: float = 0.0
    total: float = 0.0
    ticks: int = 0
    filled: int = 0
    rows: int = 0

    @property
    def own_share(self) -> float:
        """Return the part of the time that the engine spends outside its calls of the model."""
        return 1 - (self.unet + self.decode) / self.total


@dataclass
class Rates:
    """The rates of one side, run by run."""

    images_per_s: list[float] = field(default_factory=list)

    def time(self, count: int, draw: Callable[[], None]) -> float:
        """Time a run that draws `count` images; returns its seconds."""
        began = time.perf_counter()
        draw()
        seconds = time.perf_counter() - began
        self.images_per_s.append(count / seconds)
        return seconds

    @property
    def median(self) -> float:
        """Return the median rate."""
        return round(statistics.median(self.images_per_s), 2)


class TimedEngine:
    """An engine whose calls of the model are timed."""

    def __init__(self, model: Model, lanes: int, pixels: int | None = None) -> None:
        self.times = EngineTimes()
        family: Any = StableDiffusion1(model)
        family.denoise = self._timed("unet", family.denoise)
        family.decode = self._timed("decode", family.decode)
        self._engine = Engine(family, lanes=lanes, threads=1, pixels=pixels)

    def _timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*args)
            finally:
                spent = time.perf_counter() - began
                setattr(self.times, name, getattr(self.times, name) + spent)

        return timed

    def draw(self, requests: list[Request]) -> None:
        """Draw all requests."""
        before, began = self._engine.usage, time.perf_counter()
        for future in [self._engine.submit(request) for request in requests]:
            future.result()
        self.times.total += time.perf_counter() - began
        after = self._engine.usage
        self.times.ticks += after.ticks - before.ticks
        self.times.filled += after.filled - before.filled
        self.times.rows += after.rows - before.rows

    def close(self) -> None:
        """Stop the engine."""
        self._engine.close()


def best_batch(
    pipe: StableDiffusionPipeline, model: Model, requests: list[Request]
) -> tuple[int, dict[int, float]]:
    """Return the batch size at which diffusers draws fastest, and the rate of each."""
    rates = {}
    for most in BATCHES:
        rate = Rates()
        rate.time(len(requests), partial(draw_with_diffusers, pipe, model, requests, most))
        rates[most] = rate.median
    return max(rates, key=lambda most: rates[most]), rates


def compare(model: Model, requests: list[Request], lanes: int, repeats: int) -> dict[str, Any]:
    """Draw the requests with both, in turns; return the rates and what explains them."""
    torch.set_num_threads(1)
    pipe = pipeline(model)
    pipe.scheduler = DDIMScheduler.from_config(model.scheduler_config)
    most, rates = best_batch(pipe, model, requests[: max(BATCHES)])
    engine = TimedEngine(model, lanes)
    engine.draw(requests[:2])
    engine.times = EngineTimes()
    ours, theirs = Rates(), Rates()
    for turn in range(repeats):
        sides: list[tuple[Rates, Callable[[], None]]] = [
            (theirs, partial(draw_with_diffusers, pipe, model, requests, most)),
            (ours, partial(engine.draw, requests)),
        ]
        for rate, draw in sides if turn % 2 == 0 else sides[::-1]:
            rate.time(len(requests), draw)
    engine.close()
    times = engine.times
    return {
        "engine_images_per_s": ours.median,
        "diffusers_images_per_s": theirs.median,
        "ratio": round(ours.median / theirs.median, 3),
        "lanes": lanes,
        "occupancy": round(times.filled / times.rows, 3),
        "unet_ms_a_tick": round(1000 * times.unet / times.ticks, 2),
        "own_share": round(times.own_share, 4),
        "diffusers_batch": most,
        "diffusers_batches": rates,
    }


@click.command(help=__doc__)
@click.option("--model", "names", multiple=True, type=click.Choice(models.NAMES))
@click.option("--requests", default=160, show_default=True)
@click.option("--repeats", default=3, show_default=True)
@click.option("--lanes", default=32, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), help="Write the JSON here.")
def main(
    names: tuple[str, ...], requests: int, repeats: int, lanes: int, output: Path | None
) -> None:
    """Compare the engine with diffusers."""
    found: dict[str, Any] = {}
    for name in names or ("tiny", models.EMBEDDED):
        pixels = models.pixels(name)
        model = assemble(models.parts(name), Build("cpu", "float32", channels_last=True))
        for kind, batch in (
            ("uniform", uniform(requests, pixels)),
            ("mixed", mixed(requests, pixels)),
        ):
            result = compare(model, batch, lanes, repeats)
            found[f"{name} {kind}"] = result
            print(
                f"{name:9} {kind:8} engine {result['engine_images_per_s']:7.2f} images/s, "
                f"diffusers {result['diffusers_images_per_s']:7.2f} in batches of up to "
                f"{result['diffusers_batch']}: {result['ratio']:.2f} times; lanes filled "
                f"{result['occupancy']:.3f}, UNet {result['unet_ms_a_tick']} ms a tick, "
                f"own work {100 * result['own_share']:.1f} %",
                flush=True,
            )
    report(output, threads=1, requests=requests, repeats=repeats, found=found)


if __name__ == "__main__":
    main()

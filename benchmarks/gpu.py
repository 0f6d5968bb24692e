"""The yardstick on a GPU: the engine against diffusers as its users tune it, and the machine.

    python benchmarks/gpu.py --output benchmarks/results/gpu-NAME     # meant for 8 minutes
    python benchmarks/gpu.py --small                                  # the same code on a CPU

No network: random weights in the true shape of Stable Diffusion 1.5, which cost the same time.

    B1  diffusers, eager, float16             B2  with channels_last
    B3  with channels_last, fused QKV and torch.compile, max-autotune, Inductor's documented flags
    S   the engine, float16, channels_last    Sc  with engine.compile

B1 and B2 at their own best batch size; B3, which takes minutes to compile for each size, at B2's,
and for guided images alone. Rates are of two runs, in turns forwards and backwards (A-B-B-A), with
new prompts each. Writes NAME.json and NAME.md after every part, so that an interrupted run counts.
"""

import json
import platform
import random
import shutil
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import models
import torch
from findings import Findings, versions
from oracle import pipeline
from sides import Diffusers, Ours, Side, draw_alike, median_seconds, model_ms, synchronize

from sdbatch.cores import cores
from sdbatch.engine.device import driver
from sdbatch.engine.engine import Engine
from sdbatch.engine.request import Request
from sdbatch.models.build import Build
from sdbatch.models.sd1.family import StableDiffusion1
from sdbatch.models.sd1.loading import Model, assemble


@dataclass(frozen=True)
class Setting:
    """A model, a device, and the sizes of what is measured."""

    name: str  # of models.SIZES
    device: str
    dtype: str
    steps: tuple[int, ...]  # the last one without guidance, as for models of few steps
    batches: tuple[int, ...]
    lanes: int
    images: int  # a run
    matmul: int  # rows and columns of the matrices
    tune: bool  # B3 with autotuning

    @property
    def pixels(self) -> int:
        """Return the side of an image."""
        return models.SIZES[self.name].pixels


FULL = Setting("sd15", "cuda", "float16", (50, 25, 4), (4, 8, 16, 32, 64), 32, 32, 8192, tune=True)
SMALL = Setting("tiny", "cpu", "float32", (6, 3, 2), (2, 4), 8, 8, 512, tune=False)


def ceilings(setting: Setting) -> dict[str, Any]:
    """Measure the machine's limits: TFLOP/s of matrix products, TB/s of copies."""
    device, n = torch.device(setting.device), setting.matmul
    found: dict[str, Any] = {}
    for dtype in (torch.bfloat16, torch.float16):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        seconds = median_seconds(partial(torch.matmul, a, b), device, repeats=20)
        found[f"matmul {dtype} TFLOP/s".replace("torch.", "")] = round(2 * n**3 / seconds / 1e12, 3)
    source = torch.empty(n * n * 16, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = median_seconds(lambda: target.copy_(source), device, repeats=20)
    found["copy TB/s"] = round(2 * source.numel() / seconds / 1e12, 4)
    return found


def requests(setting: Setting, steps: int, count: int) -> list[Request]:
    """Return requests that are alike; guided unless the steps are the fewest."""
    few = steps == setting.steps[-1]
    return [
        Request(
            prompt=f"a photograph of a dog, number {i}",
            seed=i,
            sampler="lcm" if few else "dpmpp_2m",
            num_inference_steps=steps,
            guidance_scale=1.0 if few else 7.5,
            height=setting.pixels,
            width=setting.pixels,
        )
        for i in range(count)
    ]


def mixed(setting: Setting, count: int) -> list[Request]:
    """Return requests whose steps, sampler and guidance vary; the same ones on every call."""
    draw = random.Random(0)
    most = setting.steps[0]
    return [
        request.updated(
            sampler=draw.choice(["ddim", "euler", "dpmpp_2m", "unipc"]),
            num_inference_steps=draw.randint(most // 5, most),
            guidance_scale=1.0 if draw.random() < 1 / 3 else 7.5,
        )
        for request in requests(setting, most, count)
    ]


def model(setting: Setting, dtype: str | None = None, **build: bool) -> Model:
    """Return a model of its own: the same weights, laid out as `build` says."""
    dtype = dtype or setting.dtype
    parts = models.parts(setting.name, setting.device, getattr(torch, dtype))
    return assemble(parts, Build(setting.device, dtype, **build))


def best_batch(setting: Setting, nets: Model) -> tuple[int, dict[str, float]]:
    """Return the guided batch size whose UNet rows are fastest, and the milliseconds of each."""
    costs = {
        batch: model_ms(nets, 2 * batch, min(batch, 4), setting.pixels)[0]
        for batch in setting.batches
    }
    best = min(costs, key=lambda batch: costs[batch])
    return best, {f"batch {batch}": round(ms, 3) for batch, ms in costs.items()}


def in_turns(setting: Setting, sides: Mapping[str, Side], batch: list[Request]) -> dict[str, Any]:
    """Draw the requests with all sides forwards and backwards; return images/s, and idle shares."""
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    idle: dict[str, float] = {}
    for turn, name in enumerate([*sides, *reversed(list(sides))]):
        side = sides[name]
        fresh = [request.updated(prompt=f"{request.prompt}, turn {turn}") for request in batch]
        if isinstance(side, Diffusers):  # full batches, as its user would choose them
            fresh = (fresh * side.batch)[: -(-len(batch) // side.batch) * side.batch]
        if isinstance(side, Ours):
            side.busy_seconds()
        began = time.perf_counter()
        side.draw(fresh)
        synchronize(torch.device(setting.device))
        seconds = time.perf_counter() - began
        speeds[name].append(len(fresh) / seconds)
        if isinstance(side, Ours):
            idle[name] = round(1 - side.busy_seconds() / seconds, 4)
    return {
        name: {
            "images/s": round(statistics.median(values), 3),
            "outside UNet and VAE": idle.get(name, ""),
        }
        for name, values in speeds.items()
    }


def rates(
    setting: Setting, sides: dict[str, Side], ceiling: float, several: tuple[int, ...] = ()
) -> dict[str, Any]:
    """Return every side's rate at `several` or all numbers of steps, also in TFLOP/s."""
    unet, vae = models.flop(setting.name)
    found: dict[str, Any] = {}
    for steps in several or setting.steps:
        batch = requests(setting, steps, setting.images)
        rows = steps * (2 if batch[0].guided else 1)
        for name, row in in_turns(setting, sides, batch).items():
            tflops = row["images/s"] * (rows * unet + vae)
            share = {"TFLOP/s": round(tflops, 3), "of the ceiling": round(tflops / ceiling, 3)}
            found[f"{name}, {steps} steps"] = {**row, **share}
    ours = {name: side for name, side in sides.items() if isinstance(side, Ours)}
    if not several:
        for name, row in in_turns(setting, ours, mixed(setting, setting.images)).items():
            found[f"{name}, mixed"] = row
    return found


def accuracy(setting: Setting, b1: Model, engines: dict[str, Model]) -> dict[str, Any]:
    """Return how far diffusers and the engine are from float32, and if lanes change bits."""
    batch = requests(setting, setting.steps[1], 4)
    torch.backends.cudnn.allow_tf32 = False  # or float32 convolutions keep ten bits
    exact = _by_diffusers(model(setting, "float32"), batch)
    torch.backends.cudnn.allow_tf32 = True
    drawn = {"B1": _by_diffusers(b1, batch)}
    drawn |= {name: _images(one, batch, setting.lanes) for name, one in engines.items()}
    found: dict[str, Any] = {}
    for name, images in drawn.items():
        off = (images - exact).abs()
        found[f"{name} to float32, counts"] = f"mean {off.mean():.3f}, most {int(off.max())}"
    for name, one in engines.items():
        with_others = [*mixed(setting, 6), *batch[::-1]]
        again = _images(one, with_others, setting.lanes)[6:].flip(0)
        same = bool(torch.equal(again, drawn[name]))
        found[f"{name}: same bits in other lanes beside others"] = same
    return found


def _by_diffusers(nets: Model, batch: list[Request]) -> torch.Tensor:
    return torch.from_numpy(draw_alike(pipeline(nets), nets, batch)).float()


def _images(nets: Model, batch: list[Request], lanes: int) -> torch.Tensor:
    engine = Engine(StableDiffusion1(nets), lanes=lanes, threads=1)
    futures = [engine.submit(request) for request in batch]
    images = [torch.from_numpy(future.result().image).float() for future in futures]
    engine.close()
    return torch.stack(images)


def measure(setting: Setting, found: Findings) -> None:
    """Measure part after part."""
    ceiling = ceilings(setting)
    found.add("ceilings", ceiling)
    most = ceiling[f"matmul {'float16' if setting.dtype == 'float16' else 'bfloat16'} TFLOP/s"]
    nchw, nhwc = model(setting), model(setting, channels_last=True)
    batches = {}
    for name, one in (("B1", nchw), ("B2", nhwc)):
        batches[name], costs = best_batch(setting, one)
        found.add(f"{name}: UNet ms a row", costs)
    sides: dict[str, Side] = {
        "B1": Diffusers(nchw, batches["B1"]),
        "B2": Diffusers(nhwc, batches["B2"]),
        "S": Ours(nhwc, setting.lanes),
    }
    _calls(setting, found, {"B1": nchw, "S": nhwc})
    for name, side in sides.items():
        _warm(setting, found, name, side, setting.steps)
    found.add("eager", rates(setting, sides, most))
    found.add("accuracy", accuracy(setting, nchw, {"S": nhwc}))
    if setting.device == "cpu" and not shutil.which("g++"):
        found.add("compiled", {"not measured": "there is no C++ compiler here"})
        return
    compiled = model(setting, channels_last=True, compile=True)
    sides = {"S": sides["S"], "Sc": Ours(compiled, setting.lanes)}
    _warm(setting, found, "Sc", sides["Sc"], setting.steps)
    _calls(setting, found, {"Sc": compiled})
    found.add("engine, plain and compiled", rates(setting, sides, most))
    found.add("accuracy, compiled", accuracy(setting, nchw, {"Sc": compiled}))
    tuned = model(setting, channels_last=True)
    sides["B3"] = Diffusers(tuned, batches["B2"], compiled=True, tune=setting.tune)
    guided = setting.steps[1:2]
    _warm(setting, found, "B3", sides["B3"], guided)
    found.add("compiled", rates(setting, sides, most, guided))
    for side in sides.values():
        side.close()


def _warm(
    setting: Setting, found: Findings, name: str, side: Side, several: tuple[int, ...]
) -> None:
    """Draw twice before the timing, as the first images of a shape cause compilation."""
    began = time.perf_counter()
    for steps in {several[0], several[-1]}:
        short = [r.updated(num_inference_steps=2) for r in requests(setting, steps, 1)]
        side.draw(short)
        side.draw(short)
    found.add(f"{name}: first images", {"seconds": round(time.perf_counter() - began, 1)})


def _calls(setting: Setting, found: Findings, nets: dict[str, Model]) -> None:
    for name, one in nets.items():
        unet, vae = model_ms(one, setting.lanes, 4, setting.pixels)
        cost = {"UNet ms a lane": round(unet, 3), "VAE ms an image": round(vae, 3)}
        found.add(f"{name}: calls in {setting.lanes} lanes", cost)


@click.command(help=__doc__)
@click.option("--small", is_flag=True, help="The tests' model on a CPU.")
@click.option("--output", type=click.Path(path_type=Path), help="Write NAME.json and NAME.md.")
def main(small: bool, output: Path | None) -> None:
    """Measure."""
    setting = SMALL if small else FULL
    if not small and not torch.cuda.is_available():
        raise click.ClickException("this machine has no GPU: run with --small")
    found = Findings(output)
    gpu = torch.cuda.get_device_properties(0) if setting.device == "cuda" else None
    found.add(
        "machine",
        {
            "date": time.strftime("%Y-%m-%d"),
            "device": gpu.name if gpu else f"{platform.machine()}, {cores()} cores",
            "cuda": torch.version.cuda,
            "driver": driver(),
            "command": f"python benchmarks/gpu.py{' --small' if small else ''}",
            **versions(),
        },
    )
    began = time.perf_counter()
    measure(setting, found)
    found.add("time", {"seconds": round(time.perf_counter() - began, 1)})
    print(json.dumps(found.values))


if __name__ == "__main__":
    main()

"""gpu.py's other parts: images/s of the engine, of its peers, and of what is compiled."""

import statistics
import time
from collections.abc import Mapping
from typing import Any

import models
import torch
from bench import Bench, Setting, Work, drawn
from calls import placed
from oracle import pipeline
from sides import Diffusers, Ours, Side, draw_alike, model_ms, own_algorithms, synchronize

from sdbatch.engine.engine import Engine
from sdbatch.engine.request import Request
from sdbatch.models.sd1.family import StableDiffusion1
from sdbatch.models.sd1.loading import Model

TRIES = 4  # calls that model_ms makes, the first to warm up


def engines(bench: Bench) -> None:
    """Measure the engine with each number of lanes: 25 steps, 4 steps, different requests."""
    found = {}
    for lanes in bench.setting.lanes:
        side = Ours(bench.model("NHWC"), lanes)
        _warm(bench, side, (1, 2))
        batches = {f"{bench.setting.steps[at]} steps": bench.requests(at) for at in (1, 2)}
        batches["mixed"] = bench.mixed(bench.setting.mixed_images)
        for name, batch in batches.items():
            before = side.engine.usage
            speed = _timed(bench, side, batch)
            after = side.engine.usage
            filled = (after.filled - before.filled) / (after.rows - before.rows)
            found[f"{lanes} lanes, {name}"] = {**speed, "lanes filled": round(filled, 3)}
        side.close()
    bench.found.add("engine", found)


def engines_work(setting: Setting) -> Work:
    """Return the work of `engines`; the mixed requests have two thirds of the steps."""
    mixed = Work(setting.mixed_images * setting.steps[1] * 2 * 2 / 3, setting.mixed_images)
    return (drawn(setting, 1, 2) + mixed) * len(setting.lanes)


def peers(bench: Bench) -> None:
    """Compare the engine with diffusers, eager, in NCHW (B1) and NHWC (B2), in turns."""
    sides: dict[str, Side] = {}
    for name, layout in (("B1", "NCHW"), ("B2", "NHWC")):
        batch, sliced, costs = _best_batch(bench, bench.model(layout))
        bench.found.add(f"{name}: batch {batch}{', VAE in slices' if sliced else ''}", costs)
        sides[name] = Diffusers(bench.model(layout), batch, sliced=sliced)
    sides["S"] = Ours(bench.model("NHWC"), _best_lanes(bench))
    for side in sides.values():
        _warm(bench, side, (1, 2))
    _compare(bench, "eager", sides, (0, 1, 2))


def peers_work(setting: Setting) -> Work:
    """Return the work of `peers`: three sides, two turns, and the search for the batch."""
    search = Work(2 * sum(setting.batches), 2 * sum(setting.batches)) * (2 * TRIES)
    warm = Work(2 * 2 * 3 * max(setting.batches), 4 * max(setting.batches)) * 2
    return drawn(setting, 0, 1, 2) * 6 + search + warm


def _best_lanes(bench: Bench) -> int:
    """Return the lanes that were fastest in `engines`, or the fewer ones."""
    found = bench.found.values.get("engine", {})
    name = f"{bench.setting.steps[1]} steps"
    speeds = {
        lanes: found[f"{lanes} lanes, {name}"]["images/s"]
        for lanes in bench.setting.lanes
        if f"{lanes} lanes, {name}" in found
    }
    return max(speeds, key=lambda lanes: speeds[lanes], default=bench.setting.lanes[0])


def _best_batch(bench: Bench, model: Model) -> tuple[int, bool, dict[str, Any]]:
    """Return the guided batch of diffusers that is fastest at 25 steps, and how it decodes best.

    A batch for which the memory is too small is left out.
    """
    costs: dict[str, Any] = {}
    speeds: dict[int, tuple[float, bool]] = {}
    with own_algorithms():
        one = model_ms(model, 2, 1, bench.setting.pixels, TRIES - 1)[1]
    for batch in bench.setting.batches:
        try:
            with own_algorithms():
                unet, vae = model_ms(model, 2 * batch, batch, bench.setting.pixels, TRIES - 1)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            costs[f"batch {batch}"] = {"UNet ms a row": "out of memory"}
            continue
        costs[f"batch {batch}"] = {
            "UNet ms a row": round(unet, 3),
            "VAE ms an image": round(vae, 3),
            "VAE ms in slices of one": round(one, 3),
        }
        speeds[batch] = (2 * bench.setting.steps[1] * unet + min(one, vae), one < vae)
    best = min(speeds, key=lambda batch: speeds[batch][0])
    return best, speeds[best][1], costs


def _warm(bench: Bench, side: Side, several: tuple[int, ...]) -> None:
    """Draw before the timing, as the first images of a shape take longer."""
    for at in several:
        side.draw([r.updated(num_inference_steps=2) for r in bench.requests(at, 1)])


def _timed(bench: Bench, side: Side, batch: list[Request]) -> dict[str, float]:
    """Draw; return images/s, and of our side the share of the time outside of UNet and VAE."""
    if isinstance(side, Ours):
        side.busy_seconds()
    synchronize(bench.device)
    began = time.perf_counter()
    side.draw(batch)
    synchronize(bench.device)
    seconds = time.perf_counter() - began
    found = {"images/s": round(len(batch) / seconds, 3)}
    if isinstance(side, Ours):
        found["outside UNet and VAE"] = round(1 - side.busy_seconds() / seconds, 4)
    return found


def _compare(bench: Bench, part: str, sides: Mapping[str, Side], several: tuple[int, ...]) -> None:
    """Draw forwards and backwards with all sides; add rates, TFLOP/s and ratios to the results."""
    unet, vae = models.flop(bench.setting.name)
    found: dict[str, Any] = {}
    for at in several:
        batch = bench.requests(at)
        rows = batch[0].num_inference_steps * (2 if batch[0].guided else 1)
        speeds: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
        for turn, name in enumerate([*sides, *reversed(list(sides))]):
            fresh = [r.updated(prompt=f"{r.prompt}, turn {turn}") for r in batch]
            side = sides[name]
            if isinstance(side, Diffusers):  # full batches, as its user would choose them
                fresh = fresh[: len(fresh) // side.batch * side.batch] or fresh
            speeds[name].append(_timed(bench, side, fresh))
        for name, turns in speeds.items():
            speed = {key: statistics.median(t[key] for t in turns) for key in turns[0]}
            tflops = speed["images/s"] * (rows * unet + vae)
            found[f"{name}, {bench.setting.steps[at]} steps"] = {
                **{key: round(value, 3) for key, value in speed.items()},
                "TFLOP/s": round(tflops, 3),
                "of the ceiling": round(tflops / bench.ceiling, 3) if bench.ceiling else "",
            }
        bench.found.add(part, found)


def accuracy(bench: Bench) -> None:
    """Find out how far diffusers and the engine are from float32, and if neighbours change bits."""
    batch = bench.requests(1, 4)
    exact = _by_diffusers(bench.build("float32"), batch)  # without TF32, as `machine` has set
    lanes = bench.setting.lanes[0]
    drawn = {
        "B1": _by_diffusers(bench.model("NCHW"), batch),
        "S": _by_engine(bench.model("NHWC"), batch, lanes),
    }
    found: dict[str, Any] = {}
    for name, images in drawn.items():
        off = (images - exact).abs()
        found[f"{name} to float32, counts"] = f"mean {off.mean():.3f}, most {int(off.max())}"
    with_others = [*bench.mixed(6), *batch[::-1]]
    again = _by_engine(bench.model("NHWC"), with_others, lanes)[6:].flip(0)
    found["S: same bits in other lanes, with others"] = bool(torch.equal(again, drawn["S"]))
    bench.found.add("accuracy", found)


def accuracy_work(setting: Setting) -> Work:
    """Return the work of `accuracy`; float32 takes some ten times as long."""
    steps, lanes = setting.steps[1], setting.lanes[0]
    return Work(10 * 8 * steps + 8 * steps + 3 * steps * lanes, 40 + 4 + 14)


def _by_diffusers(model: Model, batch: list[Request]) -> torch.Tensor:
    return torch.from_numpy(draw_alike(pipeline(model), model, batch)).float()


def _by_engine(model: Model, batch: list[Request], lanes: int) -> torch.Tensor:
    engine = Engine(StableDiffusion1(model), lanes=lanes, threads=1)
    futures = [engine.submit(request) for request in batch]
    images = [torch.from_numpy(future.result().image).float() for future in futures]
    engine.close()
    return torch.stack(images)


def compiled_engine(bench: Bench) -> None:
    """Compare the engine, plain (S) and compiled (Sc): seconds to compile, bits, rates."""
    began = time.perf_counter()
    model = bench.build(channels_last=True, compile=True)
    lanes = bench.setting.lanes[0]
    sides: dict[str, Side] = {"S": Ours(bench.model("NHWC"), lanes), "Sc": Ours(model, lanes)}
    _warm(bench, sides["Sc"], (1,))
    bench.found.add("Sc: first image", {"seconds": round(time.perf_counter() - began, 1)})
    bench.found.add("Sc: places", placed(model, lanes, bench.setting.pixels))
    _warm(bench, sides["S"], (1,))
    _compare(bench, "engine, plain and compiled", sides, (1, 2))
    for side in sides.values():
        side.close()


def compiled_diffusers(bench: Bench) -> None:
    """Compare the engine with compiled diffusers (B3), guided only: a shape takes minutes."""
    model = bench.build(channels_last=True)
    batch = bench.setting.batches[-2]  # with 64 rows diffusers leaves channels_last
    began = time.perf_counter()
    b3 = Diffusers(model, batch, compiled=True, tune=bench.setting.tune)
    _warm(bench, b3, (1,))
    bench.found.add(f"B3: first {batch} images", {"seconds": round(time.perf_counter() - began, 1)})
    sides: dict[str, Side] = {"S": Ours(bench.model("NHWC"), bench.setting.lanes[0]), "B3": b3}
    _warm(bench, sides["S"], (1,))
    _compare(bench, "compiled diffusers", sides, (1,))
    sides["S"].close()


def compiled_engine_work(setting: Setting) -> Work:
    """Return the work of `compiled_engine`."""
    return drawn(setting, 1, 2) * 4


def compiled_diffusers_work(setting: Setting) -> Work:
    """Return the work of `compiled_diffusers`."""
    return drawn(setting, 1) * 4

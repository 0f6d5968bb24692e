"""gpu.py's first parts: the machine, whether a row's place changes its bits, what calls cost."""

import json
import os
import platform
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench import Bench, Setting, Work
from findings import versions
from sides import median_seconds, synchronize

from sdbatch.cores import cores
from sdbatch.engine.bits import pin_bits, recorded_environment
from sdbatch.engine.engine import Engine
from sdbatch.engine.family import Conditions
from sdbatch.engine.limits import DECODE_GROUP
from sdbatch.engine.places import differences, hashes
from sdbatch.engine.request import Request
from sdbatch.hardware import driver
from sdbatch.models.sd1.family import TEXT, StableDiffusion1
from sdbatch.models.sd1.loading import Model
from sdbatch.samplers import SAMPLERS

REPEATS = 3
SAMPLER_STEPS = 6
# (heads, head width, queries, keys) of Stable Diffusion 1.5's attention, the VAE's last
ATTENTION = ((8, 40, 4096, 4096), (8, 40, 4096, 77), (8, 80, 1024, 1024), (8, 160, 256, 256))
ATTENTION += ((8, 160, 64, 77), (1, 512, 4096, 4096))
BACKENDS = {0: "math", 1: "flash", 2: "efficient", 3: "cudnn"}


def machine(bench: Bench) -> None:
    """Describe the device, and measure its limits: TFLOP/s of matrix products, TB/s of copies.

    From here on torch has the settings of a run; diffusers draws with torch's own.
    """
    pin_bits(bench.setting.device)
    setting, device, n = bench.setting, bench.device, bench.setting.matmul
    gpu = torch.cuda.get_device_properties(0) if setting.device == "cuda" else None
    bench.found.add(
        "machine",
        {
            "date": time.strftime("%Y-%m-%d"),
            "device": gpu.name if gpu else f"{platform.machine()}, {cores()} cores",
            "multiprocessors, GiB": gpu and [gpu.multi_processor_count, gpu.total_memory >> 30],
            "cuda, cudnn": [torch.version.cuda, torch.backends.cudnn.version()],
            "driver": driver(),
            "tf32 of convolutions, of matmuls": [
                torch.backends.cudnn.allow_tf32,
                torch.backends.cuda.matmul.allow_tf32,
            ],
            "environment": recorded_environment(setting.device, os.environ),
            "command": f"python {' '.join(sys.argv)}",
            **versions(),
        },
    )
    limits: dict[str, Any] = {}
    for dtype in (torch.bfloat16, torch.float16):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        seconds = median_seconds(partial(torch.matmul, a, b), device, repeats=20)
        limits[f"matmul {dtype} TFLOP/s".replace("torch.", "")] = round(
            2 * n**3 / seconds / 1e12, 3
        )
    source = torch.empty(n * n * 16, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = median_seconds(lambda: target.copy_(source), device, repeats=20)
    limits["copy TB/s"] = round(2 * source.numel() / seconds / 1e12, 4)
    bench.ceiling = limits[
        f"matmul {'float16' if setting.dtype == 'float16' else 'bfloat16'} TFLOP/s"
    ]
    bench.found.add("ceilings", limits)
    if gpu:
        bench.found.add("attention by shape", dict(map(_backend, ATTENTION)))


def _backend(shape: tuple[int, int, int, int]) -> tuple[str, str]:
    heads, width, queries, keys = shape
    q = torch.empty(2, heads, queries, width, device="cuda", dtype=torch.half)
    k = torch.empty(2, heads, keys, width, device="cuda", dtype=torch.half)
    name = f"heads of {width}, {queries} queries, {keys} keys"
    return name, BACKENDS.get(torch._fused_sdp_choice(q, k, k), "unknown")


def rows_of(
    model: Model, count: int, pixels: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return random rows of a UNet call: latents, timesteps, text."""
    device, side = model.device, pixels // 8
    generator = torch.Generator(device).manual_seed(0)
    width = model.unet.config.cross_attention_dim
    return (
        torch.randn(count, 4, side, side, generator=generator, device=device),
        torch.linspace(999, 1, count, device=device),
        torch.randn(count, 77, width, generator=generator, device=device).to(model.dtype),
    )


def denoise(family: StableDiffusion1, rows: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Return the UNet's answer to `rows_of`."""
    latents, times, text = rows
    conditions: Conditions = {TEXT: text}
    return family.denoise(latents, times, conditions)


def placed(model: Model, lanes: int, pixels: int) -> dict[str, Any]:
    """Return what changes a row's bits: its place, its neighbours, padding; and hashes."""
    family = StableDiffusion1(model)
    request = Request(prompt="a dog, number", height=pixels, width=pixels)
    found = differences(family, request, lanes, DECODE_GROUP)
    return {
        "rows that differ, and by how much": {
            f"{each.call} {each.change}": [each.rows, each.greatest] for each in found
        },
        **hashes(family, request, lanes, DECODE_GROUP),
    }


def places(bench: Bench) -> None:
    """Find out if a row's place or its neighbours change its bits."""
    setting = bench.setting
    found = placed(bench.model("NHWC"), setting.lanes[0], setting.pixels)
    bench.found.add("places", found)


def places_work(setting: Setting) -> Work:
    """Return the work of `places`."""
    return Work(11 * setting.lanes[0], 8 * DECODE_GROUP)


def another_process(bench: Bench) -> None:
    """Compute the same in another process: the bits must be equal."""
    if "places" not in bench.found.values:
        places(bench)
    small = [] if bench.setting.device == "cuda" else ["--small"]
    command = [sys.executable, str(Path(__file__).with_name("gpu.py")), "--part", "places", *small]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    theirs, mine = json.loads(done.stdout.splitlines()[-1])["places"], bench.found.values["places"]
    found = {f"{part} is equal": theirs[part] == mine[part] for part in ("denoiser", "decoder")}
    bench.found.add("places in another process", found)


def calls(bench: Bench) -> None:
    """Time single calls by layout and rows: on the device, until launched, and their memory."""
    setting = bench.setting
    for layout, several in (("NHWC", setting.rows), ("NCHW", setting.rows[-3:-1])):
        model = bench.model(layout)
        family = StableDiffusion1(model)
        found = {}
        for count in several:
            rows = rows_of(model, count, setting.pixels)
            found[f"UNet, {count} rows"] = _cost(bench, partial(denoise, family, rows), count)
        for count in setting.decodes:
            latents = rows_of(model, count, setting.pixels)[0]
            decode = partial(family.decode, latents, model.dtype)
            found[f"VAE, {count} images"] = _cost(bench, decode, count)
        bench.found.add(f"calls, {layout}", found)
    if setting.device == "cuda":
        _attention(bench)


@torch.inference_mode()
def _cost(bench: Bench, call: Any, count: int) -> dict[str, float]:
    """Return milliseconds for each of `count` rows or images, of the launch, and GB."""
    cuda = bench.device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    call()
    synchronize(bench.device)
    began = time.perf_counter()
    for _ in range(REPEATS):
        call()
    launched = time.perf_counter() - began
    synchronize(bench.device)
    seconds = time.perf_counter() - began
    return {
        "ms each": round(1000 * seconds / REPEATS / count, 3),
        "ms to launch": round(1000 * launched / REPEATS, 2),
        "GB": round(torch.cuda.max_memory_reserved() / 1e9, 2) if cuda else 0.0,
    }


def _attention(bench: Bench) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    family, found = StableDiffusion1(bench.model("NHWC")), {}
    count = bench.setting.lanes[0]
    rows = rows_of(bench.model("NHWC"), count, bench.setting.pixels)
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        with sdpa_kernel([backend, SDPBackend.EFFICIENT_ATTENTION]):
            found[str(backend)] = _cost(bench, partial(denoise, family, rows), count)
    bench.found.add("UNet by attention", found)


def calls_work(setting: Setting) -> Work:
    """Return the work of `calls`."""
    rows = sum(setting.rows) + sum(setting.rows[-3:-1]) + 2 * setting.lanes[0]
    return Work(rows, 2 * sum(setting.decodes)) * (REPEATS + 1)


def samplers(bench: Bench) -> None:
    """Draw with every sampler: none may fail; milliseconds of a tick."""
    lanes, found = bench.setting.lanes[0], {}
    for name in SAMPLERS:
        engine = Engine(StableDiffusion1(bench.model("NHWC")), lanes=lanes, threads=1)
        requests = [
            request.updated(sampler=name, num_inference_steps=SAMPLER_STEPS)
            for request in bench.requests(1, lanes // 2)
        ]
        began = time.perf_counter()
        errors = [future.exception() for future in [engine.submit(each) for each in requests]]
        seconds = time.perf_counter() - began
        engine.close()
        found[name] = {
            "ms a tick": round(1000 * seconds / max(1, engine.usage.ticks), 1),
            "failed": next((str(error)[:200] for error in errors if error), ""),
            "lanes reduced": "; ".join(engine.usage.shrunk),
        }
    bench.found.add("samplers", found)


def samplers_work(setting: Setting) -> Work:
    """Return the work of `samplers`; a third of them call the UNet twice a step."""
    lanes = setting.lanes[0]
    return Work(lanes * SAMPLER_STEPS * 4 / 3, lanes / 2) * len(SAMPLERS)

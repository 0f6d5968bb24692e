"""What `cache_interval` gains and what it costs: speed, and how far images are from the exact ones.

    python benchmarks/deep_cache.py --output benchmarks/results/deep_cache.json

Draws the same prompts and seeds with builtin:shapes, each with every interval: images per second of
CPU time of one thread (other programs may share the machine, so the intervals take turns, a group
of images each, and the median counts), PSNR to the images of interval 1, and the judge's fidelity.
Counts the FLOP of a whole call and of a shallow one for a lane, of this UNet and of the UNet of
Stable Diffusion 1.5 at 512x512. Prints JSON on the last line.
"""

import math
import statistics
import time
from pathlib import Path
from typing import Any

import click
import fidelity
import models
import numpy as np
import torch
from diffusers import UNet2DConditionModel
from findings import report
from torch.utils.flop_counter import FlopCounterMode

from sdbatch.engine.engine import Engine
from sdbatch.engine.family import Cache
from sdbatch.engine.request import Request
from sdbatch.models.build import Build
from sdbatch.models.sd1.deep_cache import DeepCache
from sdbatch.models.sd1.family import StableDiffusion1
from sdbatch.models.sd1.loading import Model
from sdbatch.models.sd1.row_loras import RowLoras
from sdbatch.shapes.picture import Pixels

INTERVALS = (1, 2, 3, 5)
STEPS = (25, 50)
GUIDANCE = 3.0
LANES = 16


def draw(engine: Engine, captioned: list[fidelity.Caption], **values: int) -> list[Pixels]:
    """Draw the prompts; the seed of each is its length."""
    futures = [
        engine.submit(
            Request(
                prompt=prompt,
                seed=len(prompt),
                sampler="dpmpp_2m",
                guidance_scale=GUIDANCE,
                height=fidelity.SIDE,
                width=fidelity.SIDE,
                **values,
            )
        )
        for _, prompt in captioned
    ]
    return [future.result().image for future in futures]


def compare(engine: Engine, captioned: list[fidelity.Caption], steps: int) -> dict[str, Any]:
    """Draw all prompts with every interval, in turns; return the findings by interval."""
    images: dict[int, list[Pixels]] = {interval: [] for interval in INTERVALS}
    seconds: dict[int, list[float]] = {interval: [] for interval in INTERVALS}
    for start in range(0, len(captioned), LANES):
        group = captioned[start : start + LANES]
        for interval in INTERVALS:
            began = time.process_time()
            images[interval] += draw(
                engine, group, num_inference_steps=steps, cache_interval=interval
            )
            seconds[interval].append((time.process_time() - began) / len(group))
    exact = statistics.median(seconds[1])
    return {
        str(interval): {
            "images_per_cpu_s": round(1 / statistics.median(seconds[interval]), 3),
            "times_interval_1": round(exact / statistics.median(seconds[interval]), 2),
            "psnr_db": None if interval == 1 else psnr(images[interval], images[1]),
            "fidelity_percent": fidelity.rates(
                [
                    (prompt, image)
                    for (_, prompt), image in zip(captioned, images[interval], strict=True)
                ]
            )[fidelity.WHOLE],
        }
        for interval in INTERVALS
    }


def psnr(images: list[Pixels], exact: list[Pixels]) -> float:
    """Return the mean PSNR of images to the exact ones, in dB; of equal ones 60."""
    errors = [
        float(np.mean((one.astype(float) - two) ** 2))
        for one, two in zip(images, exact, strict=True)
    ]
    return round(statistics.mean(10 * math.log10(1 / max(e / 255**2, 1e-6)) for e in errors), 2)


def gflop(unet: UNet2DConditionModel, side: int) -> dict[str, Any]:
    """Return the GFLOP of a lane's calls for images of `side` pixels, and what follows from them.

    The gains are upper bounds for the UNet alone.
    """
    model = Model(
        tokenizer=None,
        text_encoder=None,
        unet=unet.to("meta"),
        vae=None,
        scheduler_config={},
        device=torch.device("meta"),
        dtype=torch.float32,
        layout=torch.contiguous_format,
        row_loras=RowLoras({}, {}, torch.nn.Module(), compiled=False),
        build=Build("meta", "float32"),
    )
    with torch.device("meta"), torch.inference_mode():
        latents, timesteps = torch.empty(1, 4, side // 8, side // 8), torch.empty(1)
        text = torch.empty(1, 77, unet.config["cross_attention_dim"])
        calls, cache, counted = DeepCache(model), Cache(), []
        for _ in ("whole", "shallow"):
            with FlopCounterMode(display=False) as count:
                calls.denoise(latents, timesteps, text, cache)
            counted.append(count.get_total_flops() / 1e9)
    whole, shallow = counted
    share = shallow / whole
    bounds = {str(n): round(n / (1 + (n - 1) * share), 2) for n in INTERVALS}
    return {
        "whole": round(whole, 2),
        "shallow": round(shallow, 2),
        "shallow_share": round(share, 4),
        "gain_of_the_unet_at_most": bounds,
    }


@click.command(help=__doc__)
@click.option("--images", default=48, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), help="Write the JSON here.")
def main(images: int, output: Path | None) -> None:
    """Measure."""
    torch.set_num_threads(1)
    with torch.device("meta"):
        sd15 = UNet2DConditionModel(**models.SIZES["sd15"].unet)
    calls = {
        "builtin:shapes, 128x128": gflop(models.parts(models.EMBEDDED)["unet"], fidelity.SIDE),
        "Stable Diffusion 1.5, 512x512": gflop(sd15, 512),
    }
    engine = Engine(StableDiffusion1(fidelity.load_model("float32")), lanes=LANES, threads=1)
    captioned = fidelity.prompts(images)
    draw(engine, captioned[:LANES], num_inference_steps=2, cache_interval=2)  # a warm-up
    drawn = {}
    for steps in STEPS:
        drawn[f"{steps} steps"] = compare(engine, captioned, steps)
        print(f"{steps} steps: {drawn[f'{steps} steps']}", flush=True)
    engine.close()
    settings = {"sampler": "dpmpp_2m", "guidance": GUIDANCE, "lanes": LANES, "dtype": "float32"}
    report(output, images=images, threads=1, **settings, gflop_of_a_lane=calls, drawn=drawn)


if __name__ == "__main__":
    main()

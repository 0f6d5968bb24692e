"""How far the engine's latents and images are from diffusers' pipelines', by sampler and mode.

    python benchmarks/parity.py [--steps 10] [--dtype float32] [--output benchmarks/results/parity]

Every sampler in every mode, on tiny random models: the engine in 8 lanes against diffusers, which
draws the request alone. The difference is rounding: the UNet's batch has another shape (8 rows
against 1 to 3), which moves each of its answers by about 1e-6 of their size, and a sampler passes
that on from step to step.

diffusers samples the posterior of an encoded picture with the generator of the noise; rows take its
mean. So diffusers takes the mean here too (oracle.posterior_means). Its LMS is wrong from a picture
on, and corrected here (oracle.LMS); how far the engine is from diffusers' own is shown by itself.
"""

import platform
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import click
import diffusers
import models
import numpy as np
import oracle
import torch
from findings import Findings, versions
from PIL import Image

from sdbatch import samplers
from sdbatch.cores import cores
from sdbatch.engine.request import Request
from sdbatch.models.build import Build
from sdbatch.models.sd1.loading import assemble
from sdbatch.samplers import NAMES

SIDE, LANES = 64, 8
PICTURE = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
MASK = np.zeros((SIDE, SIDE), np.uint8)
MASK[8:40, 16:56] = 255


@dataclass(frozen=True)
class Mode:
    """A way to draw: what the request has, and which pipeline of diffusers draws it."""

    name: str
    pipeline: Any
    channels: int = 4  # of the UNet's input
    picture: bool = True
    mask: bool = False
    guidance_scale: float = 7.5
    strength: float | None = None  # None: the model has none

    def request(self, sampler: str, steps: int) -> Request:
        """Return what the engine draws."""
        values: dict[str, Any] = {}
        if self.strength is not None:
            values["strength"] = self.strength
        if self.picture:
            values["inputs"] = {"image": PICTURE} | ({"mask": MASK} if self.mask else {})
        return Request(
            prompt="a photograph of a dog",
            seed=7,
            sampler=sampler,
            num_inference_steps=10 if sampler.endswith("_ays") else steps,
            guidance_scale=self.guidance_scale,
            height=SIDE,
            width=SIDE,
            **values,
        )

    def arguments(self, request: Request) -> dict[str, Any]:
        """Return what the pipeline takes besides what all of them take."""
        given: dict[str, Any] = {}
        if self.picture:
            given["image"] = Image.fromarray(PICTURE)
        if self.mask:
            given["mask_image"] = Image.fromarray(MASK)
        if self.strength is not None:
            given["strength"] = self.strength
        if self.channels == 8:
            given["image_guidance_scale"] = request.image_guidance_scale
        return given


def _modes() -> Iterable[Mode]:
    text = diffusers.StableDiffusionPipeline
    yield Mode("text", text, picture=False)
    yield Mode("text, unguided", text, picture=False, guidance_scale=1.0)
    for strength in (0.75, 0.35):
        yield Mode(f"image {strength}", diffusers.StableDiffusionImg2ImgPipeline, strength=strength)
    for channels in (4, 9):
        for strength in (0.75, 1.0):
            name = f"inpainting, {channels} channels, {strength:g}"
            pipeline = diffusers.StableDiffusionInpaintPipeline
            yield Mode(name, pipeline, channels, mask=True, strength=strength)
    yield Mode("edit", diffusers.StableDiffusionInstructPix2PixPipeline, 8)


MODES = tuple(_modes())


def load_pair(channels: int, dtype: str) -> oracle.Pair:
    """Return the engine and diffusers over a tiny model with that many channels."""
    parts = models.parts("tiny", dtype=getattr(torch, dtype), channels=channels)
    return oracle.Pair(assemble(parts, Build("cpu", dtype, channels_last=True)), LANES)


def difference(pair: oracle.Pair, mode: Mode, sampler: str, steps: int) -> dict[str, float]:
    """Return the largest differences of a mode's request."""
    request = mode.request(sampler, steps)
    latents, counts = pair.differences(mode.pipeline, request, **mode.arguments(request))
    return {"latents": float(f"{latents:.1e}"), "counts": counts}


def compare(
    names: Iterable[str], steps: int, pairs: dict[int, oracle.Pair], modes: Iterable[Mode] = MODES
) -> dict[str, dict[str, dict[str, float]]]:
    """Return the differences by sampler and mode."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for sampler in names:
        found[sampler] = {
            mode.name: difference(pairs[mode.channels], mode, sampler, steps) for mode in modes
        }
        cells = [f"{each['latents']:.0e} {each['counts']:.0f}" for each in found[sampler].values()]
        print(f"{sampler:24}", *(f"{cell:>9}" for cell in cells), flush=True)
    return found


def largest(found: dict[str, dict[str, dict[str, float]]]) -> dict[str, dict[str, float | str]]:
    """Return the largest differences of each mode, and of which sampler."""
    by_mode: dict[str, dict[str, float | str]] = {}
    for mode in (mode.name for mode in MODES):
        worst = max(found, key=lambda sampler: found[sampler][mode]["latents"])
        by_mode[mode] = {
            "latents, of their size": found[worst][mode]["latents"],
            "of sampler": worst,
            "counts of 255": max(each[mode]["counts"] for each in found.values()),
        }
    return by_mode


def table(found: dict[str, dict[str, dict[str, float]]]) -> dict[str, dict[str, str]]:
    """Return what `compare` found as cells: the latents' difference, and the counts if any."""
    return {
        sampler: {
            mode: f"{each['latents']:.1e}" + (f", {each['counts']}" if each["counts"] else "")
            for mode, each in modes.items()
        }
        for sampler, modes in found.items()
    }


@click.command(help=__doc__)
@click.option("--steps", default=10, show_default=True)
@click.option("--dtype", default="float32", show_default=True)
@click.option("--output", type=click.Path(path_type=Path), help="Where .json and .md go.")
def main(steps: int, dtype: str, output: Path | None) -> None:
    """Compare every sampler with diffusers in every mode."""
    torch.set_num_threads(1)
    findings = Findings(output)
    machine = platform.processor() or platform.machine()
    findings.add(
        "machine",
        {"device": f"{machine}, {cores()} cores, one thread", "date": time.strftime("%Y-%m-%d")}
        | {"dtype": dtype, "steps": steps}
        | versions(),
    )
    pairs = {channels: load_pair(channels, dtype) for channels in (4, 9, 8)}
    with oracle.posterior_means():
        found = compare(NAMES, steps, pairs)
        from_pictures = [mode for mode in MODES if (mode.strength or 1) < 1]
        lms = [name for name in NAMES if samplers.split(name)[0].scheduler in oracle.CORRECTED]
        with mock.patch.dict(oracle.CORRECTED, clear=True):
            uncorrected = compare(lms, steps, pairs, from_pictures)
    for pair in pairs.values():
        pair.engine.close()
    findings.add("the largest difference of each mode", largest(found))
    findings.add("by sampler: latents, of their size; counts of 255 if they differ", table(found))
    findings.add("diffusers' own LMS from a picture, the same", table(uncorrected))


if __name__ == "__main__":
    main()

"""A table of all modes: the engine against diffusers' pipelines, grouped by equal parameters.

    python benchmarks/mixed_modes.py [--rows 400] [--lanes 32] [--slices 4]

Rows draw from text, from a picture, around a mask, around one that is cut out, with a variation,
between two seeds and prompts, with hires fix, and with a prompt that changes (tests/mixed_rows.py),
with samplers, steps, guidance, size and strength of their own, or with one of a few sets of them.
Both sides get the pictures as the reading stage fits them, and draw on the tiny model, in one
thread. diffusers draws a group in one call of the pipeline of its mode, in batches of the best
size. It draws a part of the groups in turn with the engine, which draws all rows. The rates are by
CPU seconds of the process, as others may use the machine; ratio_wall is by the clock. Both must
have put the same number of rows through the UNet. Prints a table and, on the last line, JSON.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import click
import models
import numpy as np
import pyarrow as pa
import torch
from before_after import ROOT
from diffusers import (
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from engine import EngineTimes, TimedEngine
from findings import report
from oracle import pipeline

sys.path.insert(0, str(ROOT))

from sdbatch import schema
from sdbatch.engine.enlarge import enlarge_latents, with_enlarged
from sdbatch.engine.noise import slerp, slerp_columns
from sdbatch.engine.request import Request
from sdbatch.inputs.prepare import Prepared
from sdbatch.job import parse
from sdbatch.models.build import Build
from sdbatch.models.schedulers import make_scheduler
from sdbatch.models.sd1.loading import Model, assemble
from sdbatch.output.plan import make_plan
from sdbatch.prompt_schedule import Calls, schedule
from sdbatch.prompts.table import open_table
from sdbatch.sampling import LATENT_UPSCALERS
from sdbatch.stages.draw import request_rows
from sdbatch.stages.read import ReadPrompts
from tests import mixed_rows

STEPS = (20, 25, 30)
PRESETS = {"own": 0, "4 sets": 4}  # name of a table -> sets of parameters that its rows share
BATCHES = (4, 8, 16, 32)
TRIED = 40  # groups with which the best batch size is found


def read_requests(rows: int, presets: int) -> list[Request]:
    """Return the requests of a table, with their pictures as the reading stage fits them."""
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder, "rows.parquet")
        mixed_rows.write_table(table, rows, STEPS, presets)
        job = parse(
            {
                "prompts": {"path": str(table)},
                "model": "builtin:shapes",
                "output": {"path": str(Path(folder, "out"))},
            }
        )
        plan = make_plan(job, open_table(job.prompts), None)
        stage, urls, read = ReadPrompts(plan.job, plan.table), plan.urls(), []
        for shard in plan.shards:
            planned = {**asdict(shard), "url": urls[shard.source]}
            read += request_rows(stage(pa.Table.from_pylist([planned])))
    requests = []
    for row in read:
        if row["error"] is not None:
            raise SystemExit(f"a row of the benchmark fails: {row['error']}")
        values = {field.name: row[field.name] for field in schema.SAMPLING}
        data = row[schema.INPUTS.name]
        inputs = {} if data is None else Prepared.from_bytes(data).arrays
        requests.append(Request(**values, inputs=inputs))
    return requests


def texts(request: Request) -> list[tuple[int, str]]:
    """Return the prompt over time, each text with the last denoiser call of it."""
    steps = request.num_inference_steps
    if not request.prompt_weights:
        return [(steps, request.prompt)]
    return schedule(request.prompt, Calls(steps, 0))


def alike(request: Request) -> tuple[Any, ...]:
    """Return what requests must have in common for one call of a pipeline of diffusers."""
    return (
        *(request.sampler, request.num_inference_steps, request.guidance_scale),
        *(request.height, request.width, tuple(end for end, _ in texts(request))),
        request.strength if request.inputs else None,
        tuple(sorted(request.inputs)),
        bool(request.prompt_b),
        request.variation_strength > 0,
        *(request.hires_scale, request.hires_steps, request.hires_strength),
        request.hires_upscaler if request.hires_scale > 1 else None,
    )


def groups(requests: list[Request]) -> list[list[Request]]:
    """Return the requests in groups that diffusers can draw together."""
    found: dict[Any, list[Request]] = {}
    for request in requests:
        found.setdefault(alike(request), []).append(request)
    return list(found.values())


class Grouped:
    """A user's loop around diffusers' pipelines, one call for each batch of equal parameters."""

    def __init__(self, model: Model) -> None:
        self.unet_rows = 0
        self._config = model.scheduler_config
        self._text = pipeline(model)
        self._image = pipeline(model, StableDiffusionImg2ImgPipeline)
        self._mask = pipeline(model, StableDiffusionInpaintPipeline)
        model.unet.register_forward_pre_hook(self._count)

    def _count(self, _: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        self.unet_rows += len(given[0])

    def draw(self, group: list[Request], most: int) -> list[Any]:
        """Draw a group in batches of up to `most`."""
        drawn: list[Any] = []
        for start in range(0, len(group), most):
            drawn.extend(self._draw(group[start : start + most]))
        return drawn

    def _draw(self, batch: list[Request]) -> Any:
        first = batch[0]
        given: dict[str, Any] = {
            "negative_prompt": [request.negative_prompt for request in batch],
            "num_inference_steps": first.num_inference_steps,
            "guidance_scale": first.guidance_scale,
            "generator": [torch.Generator().manual_seed(request.seed) for request in batch],
            "output_type": "pt",
        }
        given |= self._prompts(batch)
        if "image" in first.inputs:
            given |= {"strength": first.strength, "image": _stacked(batch, "image")}
        else:
            given |= {"height": first.height, "width": first.width}
        if "mask" in first.inputs:
            given |= {"height": first.height, "width": first.width}
            given["mask_image"] = _stacked(batch, "mask")
            return _counts(self._call(self._mask, first, given))
        if "image" in first.inputs:
            return _counts(self._call(self._image, first, given))
        if first.variation_strength or first.prompt_b:
            given["latents"] = torch.stack([_noise(request) for request in batch])
        if first.hires_scale == 1:
            return _counts(self._call(self._text, first, given))
        if first.hires_upscaler in LATENT_UPSCALERS:
            given["output_type"] = "latent"
        return self._enlarge(batch, given, self._call(self._text, first, given))

    def _call(self, pipe: StableDiffusionPipeline, first: Request, given: dict[str, Any]) -> Any:
        steps = given["num_inference_steps"]
        pipe.scheduler = make_scheduler(first.sampler, self._config, steps)
        return pipe(**given).images

    def _enlarge(self, batch: list[Request], given: dict[str, Any], drawn: torch.Tensor) -> Any:
        """Draw the second pass of hires fix."""
        seconds = [request.enlarged() for request in batch]
        first, second = batch[0], seconds[0]
        assert second is not None, "the request has a second pass"
        if second.hires_upscaler in LATENT_UPSCALERS:
            given["image"] = torch.stack([enlarge_latents(each, first, second) for each in drawn])
            given["output_type"] = "pt"
        else:
            enlarged = [with_enlarged(second, each) for each in _counts(drawn)]
            given["image"] = _stacked(enlarged, "image")
        steps, begin = second.steps_from_picture()
        given["num_inference_steps"] = steps
        given["strength"] = (steps - begin + 0.5) / steps
        given["generator"] = [torch.Generator().manual_seed(request.seed) for request in batch]
        del given["height"], given["width"]
        return _counts(self._call(self._image, second, given))

    def _prompts(self, batch: list[Request]) -> dict[str, Any]:
        """Return the prompts of a batch: as text, or encoded where they are mixed or change."""
        over_time = [texts(request) for request in batch]
        if len(over_time[0]) == 1 and not batch[0].prompt_b:
            return {"prompt": [request.prompt for request in batch]}
        embedded = [
            self._embed(batch, [each[part][1] for each in over_time])
            for part in range(len(over_time[0]))
        ]
        prompt, negative = embedded[0]
        if batch[0].prompt_b:
            other, _ = self._embed(batch, [request.prompt_b for request in batch])
            mix = torch.tensor([request.mix for request in batch])[:, None, None]
            prompt = torch.lerp(prompt, other, mix)
        given = {"prompt_embeds": prompt, "negative_prompt_embeds": negative}
        given["negative_prompt"] = None
        if len(embedded) > 1:
            begins = {end: embedded[i + 1][0] for i, (end, _) in enumerate(over_time[0][:-1])}
            given["callback_on_step_end"] = partial(_change_prompt, begins, negative)
            given["callback_on_step_end_tensor_inputs"] = ["prompt_embeds"]
        return given

    def _embed(self, batch: list[Request], prompts: list[str]) -> tuple[Any, Any]:
        guided = batch[0].guidance_scale > 1
        negatives = [request.negative_prompt for request in batch]
        found: tuple[Any, Any] = self._text.encode_prompt(prompts, "cpu", 1, guided, negatives)
        return found


def _change_prompt(
    begins: dict[int, torch.Tensor],
    negative: torch.Tensor | None,
    _: StableDiffusionPipeline,
    step: int,
    __: Any,
    given: dict[str, Any],
) -> dict[str, Any]:
    """Give the pipeline the text that begins after a step, if there is one."""
    if step + 1 in begins:
        prompt = begins[step + 1]
        given["prompt_embeds"] = prompt if negative is None else torch.cat([negative, prompt])
    return given


def _stacked(batch: list[Request], name: str) -> torch.Tensor:
    """Return pictures as diffusers takes them: (n, 3, H, W), masks (n, 1, H, W), in [0, 1]."""
    arrays = torch.from_numpy(np.stack([request.inputs[name] for request in batch]))
    arrays = arrays[:, None] if name == "mask" else arrays.permute(0, 3, 1, 2)
    return arrays.float() / 255


def _counts(images: torch.Tensor) -> Any:
    return (images.permute(0, 2, 3, 1).float() * 255).round().to(torch.uint8).numpy()


def _noise(request: Request) -> torch.Tensor:
    """Return the starting noise of a variation or an interpolation, (C, h, w)."""

    def of(seed: int) -> torch.Tensor:
        shape = (4, request.height // 8, request.width // 8)
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    if request.variation_strength:
        other = of(request.variation_seed)
        return slerp_columns(request.variation_strength, of(request.seed), other)
    return slerp(request.mix, of(request.seed), of(request.seed_b))


@dataclass
class Seconds:
    """The seconds of some work: of the process on CPUs, and of the clock."""

    cpu: float = 0.0
    wall: float = 0.0

    def time(self, work: Callable[[], Any]) -> None:
        """Add the seconds of some work."""
        cpu, wall = time.process_time(), time.perf_counter()
        work()
        self.cpu += time.process_time() - cpu
        self.wall += time.perf_counter() - wall


def best_batch(grouped: Grouped, parts: list[list[Request]]) -> tuple[int, dict[int, float]]:
    """Return the batch size at which diffusers draws the largest groups fastest, and the rates."""
    tried = sorted(parts, key=len)[-TRIED:]
    largest = max(map(len, parts))
    rates = {}
    for most in BATCHES:
        if rates and most // 2 >= largest:
            break  # no group is larger
        seconds = Seconds()
        for group in tried:
            seconds.time(partial(grouped.draw, group, most))
        rates[most] = round(sum(map(len, tried)) / seconds.cpu, 2)
    return max(rates, key=lambda most: rates[most]), rates


def compare(model: Model, requests: list[Request], lanes: int, slices: int) -> dict[str, Any]:
    """Draw the requests with both, in turns; return the rates and what explains them."""
    torch.set_num_threads(1)
    parts, grouped = groups(requests), Grouped(model)
    most, rates = best_batch(grouped, parts)
    side = models.pixels("tiny")
    engine = TimedEngine(model, lanes, pixels=side * side)
    engine.draw(requests[: len(mixed_rows.MODES)])
    engine.times = EngineTimes()
    ours, theirs = [], Seconds()
    grouped.unet_rows = unet_rows = 0
    for part in range(slices + 1):
        ours.append(Seconds())
        ours[-1].time(partial(engine.draw, requests))
        if part < slices:
            before = grouped.unet_rows
            for group in parts[part::slices]:
                theirs.time(partial(grouped.draw, group, most))
            unet_rows += grouped.unet_rows - before
    engine.close()
    times, count = engine.times, len(requests)
    if unet_rows * len(ours) != times.filled:
        raise SystemExit(f"diffusers: {unet_rows} rows of the UNet, we {times.filled}")
    cpu = [each.cpu for each in ours]
    return {
        "rows": count,
        "parameter_sets": len(parts),
        "largest_groups": sorted(map(len, parts))[:-6:-1],
        "engine_images_per_s": round(count / median(cpu), 2),
        "engine_fastest_slowest": [round(count / each, 2) for each in (min(cpu), max(cpu))],
        "diffusers_images_per_s": round(count / theirs.cpu, 2),
        "ratio": round(theirs.cpu / median(cpu), 2),
        "ratio_wall": round(theirs.wall / median(each.wall for each in ours), 2),
        "lanes": lanes,
        "lanes_filled": round(times.filled / times.rows, 3),
        "unet_rows": unet_rows,
        "own_share": round(times.own_share, 3),
        "diffusers_batch": most,
        "diffusers_batches": rates,
    }


@click.command(help=__doc__)
@click.option("--rows", default=400, show_default=True)
@click.option("--lanes", default=32, show_default=True, help="Of the smallest size.")
@click.option("--slices", default=4, show_default=True, help="Of diffusers' groups.")
@click.option("--table", "tables", multiple=True, type=click.Choice(tuple(PRESETS)))
@click.option("--output", type=click.Path(path_type=Path), help="Write the JSON here.")
def main(rows: int, lanes: int, slices: int, tables: tuple[str, ...], output: Path | None) -> None:
    """Compare the engine with diffusers on tables of all modes."""
    found: dict[str, Any] = {}
    for name in tables or PRESETS:
        model = assemble(models.parts("tiny"), Build("cpu", "float32", channels_last=True))
        result = compare(model, read_requests(rows, PRESETS[name]), lanes, slices)
        found[name] = result
        print(
            f"{name:8} {result['parameter_sets']:4} sets: engine {result['engine_images_per_s']:6} "
            f"images/s, diffusers {result['diffusers_images_per_s']:6} in batches of up to "
            f"{result['diffusers_batch']}: {result['ratio']} times; lanes filled "
            f"{result['lanes_filled']}, own work {100 * result['own_share']:.1f} %",
            flush=True,
        )
        report(output, threads=1, slices=slices, time="CPU seconds of the process", found=found)


if __name__ == "__main__":
    main()

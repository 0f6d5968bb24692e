"""How well builtin:shapes obeys its prompts, by guidance and by steps, as the judge reads them.

    python benchmarks/fidelity.py --output benchmarks/results/fidelity

Draws scenes whose first group has a pair of shape and colour that training never showed, with
guidance 1 to 10, on the same prompts and seeds; then, on others, with the best one, in 25 steps
and in 8, in float32 and in bfloat16. The upper bounds are the judge's verdicts on the scenes as
they are rendered, and as the autoencoder returns them. Prints tables, and writes them with the
curve over guidance as a plot.
"""

import platform
import random
import time
from concurrent.futures import Future
from pathlib import Path

import click
import numpy as np
import torch
from findings import Findings, versions
from matplotlib.figure import Figure

from sdbatch.cores import cores
from sdbatch.engine.engine import Engine
from sdbatch.engine.request import Drawn, Request
from sdbatch.job import Model as ModelSettings
from sdbatch.job import Safety
from sdbatch.models.build import Build
from sdbatch.models.find_model import find_model
from sdbatch.models.sd1 import loading
from sdbatch.models.sd1.family import StableDiffusion1
from sdbatch.models.sd1.loading import Model
from sdbatch.registry import EMBEDDED_MODEL
from sdbatch.shapes import captions, judge, parse, picture, world
from sdbatch.shapes.world import Scene

GUIDANCE = (1, 1.5, 2, 2.5, 3, 4, 6, 8, 10)
STEPS, FEW = 25, 8
SIDE = 128  # pixels
WHOLE = "fidelity"  # the mean part of a prompt that its picture shows
SEVERAL = "count, of two or more"

Rates = dict[str, str | float]  # by attribute, %, of the images whose prompts name it
Caption = tuple[Scene, str]  # a scene and its prompt


def load_model(dtype: str) -> Model:
    """Load the embedded model, laid out as `auto` does for the dtype."""
    files = find_model(ModelSettings(path=EMBEDDED_MODEL), Safety())
    return loading.load(files, Build("cpu", dtype, channels_last=dtype == "float32"))


def prompts(count: int) -> list[Caption]:
    """Return held-out scenes and their prompts, always the same."""
    chance = random.Random("fidelity")
    scenes = (world.random_scene(chance, world.is_for_testing) for _ in range(count))
    return [(scene, captions.write_caption(scene, chance)) for scene in scenes]


def draw(engine: Engine, captioned: list[Caption], guidance: float, steps: int) -> Rates:
    """Draw the prompts and judge the pictures."""
    drawn: list[tuple[str, Future[Drawn]]] = []
    for seed, (_, prompt) in enumerate(captioned):
        request = Request(
            prompt=prompt,
            seed=seed,
            sampler="dpmpp_2m",
            num_inference_steps=steps,
            guidance_scale=guidance,
            height=SIDE,
            width=SIDE,
        )
        drawn.append((prompt, engine.submit(request)))
    return rates([(prompt, future.result().image) for prompt, future in drawn])


def upper_bounds(model: Model, captioned: list[Caption]) -> dict[str, Rates]:
    """Judge the scenes as they are rendered, and after the autoencoder."""
    rendered, decoded = [], []
    for number, (scene, prompt) in enumerate(captioned):
        pixels = picture.render(scene, random.Random(f"fidelity-{number}"))
        rendered.append((prompt, pixels))
        x = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 127.5 - 1
        with torch.inference_mode():
            y = model.vae.decode(model.vae.encode(x).latent_dist.mean).sample[0]
        counts = ((y + 1) * 127.5).round().clamp(0, 255).permute(1, 2, 0)
        decoded.append((prompt, counts.numpy().astype(np.uint8)))
    return {"rendered": rates(rendered), "through the autoencoder": rates(decoded)}


def rates(pictures: list[tuple[str, picture.Pixels]]) -> Rates:
    """Return how much of what the prompts name the pictures show, in %."""
    verdicts = [(prompt, judge.judge_picture(prompt, pixels)) for prompt, pixels in pictures]
    read = [(prompt, verdict) for prompt, verdict in verdicts if verdict is not None]
    whole = [judge.fidelity(verdict) for _, verdict in read]
    found: Rates = {WHOLE: round(100 * sum(whole) / len(whole), 1)}
    for name in judge.ATTRIBUTES:
        found[name] = _rate([verdict[name] for _, verdict in read])
    found[SEVERAL] = _rate([verdict["count"] for prompt, verdict in read if _is_several(prompt)])
    return found


def _rate(verdicts: list[bool | None]) -> str | float:
    named = [holds for holds in verdicts if holds is not None]
    return round(100 * sum(named) / len(named), 1) if named else "no prompt names it"


def _is_several(prompt: str) -> bool:
    scene = parse.parse_prompt(prompt)
    return scene is not None and any((group.count or 1) > 1 for group in scene.groups)


def plot(curve: dict[str, Rates], path: Path) -> None:
    """Plot the rates over guidance, a line for each attribute."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name in (WHOLE, *judge.ATTRIBUTES):
        values = [float(found[name]) for found in curve.values()]
        width = 3 if name == WHOLE else 1.5
        axes.plot(
            [float(scale) for scale in curve], values, marker="o", label=name, linewidth=width
        )
    axes.set_xlabel("guidance_scale")
    axes.set_ylabel("images that show what their prompts name, %")
    axes.set_title(f"builtin:shapes, held-out prompts, dpmpp_2m, {STEPS} steps")
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=110)


@click.command(help=__doc__)
@click.option("--images", default=1000, show_default=True, help="With the best guidance.")
@click.option("--curve", default=150, show_default=True, help="With each guidance.")
@click.option("--threads", default=2, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), help="Where .json, .md, .png go.")
def main(images: int, curve: int, threads: int, output: Path | None) -> None:
    """Measure."""
    findings = Findings(output)
    machine = f"{platform.machine()}, {cores()} cores"
    findings.add("machine", {"device": machine, "date": time.strftime("%Y-%m-%d"), **versions()})
    model = load_model("float32")
    engine = Engine(StableDiffusion1(model), lanes=32, threads=threads)
    captioned = prompts(curve + images)
    findings.add(f"% right at most, {images} images", upper_bounds(model, captioned[curve:]))
    found = {f"{scale:g}": draw(engine, captioned[:curve], scale, STEPS) for scale in GUIDANCE}
    findings.add(f"% right over guidance, {STEPS} steps, {curve} images each", found)
    if output:
        plot(found, output.with_suffix(".png"))
    best = max(found, key=lambda scale: float(found[scale][WHOLE]))
    settings = [(best, STEPS), (best, FEW), ("1", STEPS)]
    of_steps = {
        f"guidance {scale}, {steps} steps": draw(engine, captioned[curve:], float(scale), steps)
        for scale, steps in settings
    }
    engine.close()
    engine = Engine(StableDiffusion1(load_model("bfloat16")), lanes=32, threads=threads)
    of_steps |= {
        f"guidance {scale}, {steps} steps, bfloat16": draw(
            engine, captioned[curve:], float(scale), steps
        )
        for scale, steps in settings[:2]
    }
    findings.add(f"% right, {images} other images each", of_steps)
    engine.close()


if __name__ == "__main__":
    main()

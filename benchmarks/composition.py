"""How well builtin:shapes draws from pictures, between prompts and larger, as the judge reads it.

    python benchmarks/composition.py --output benchmarks/results/composition

Four figures, with the same seeds in every run, of scenes of plain shapes in any pair of shape and
colour, dpmpp_2m, guidance 2.5:

- recolouring: a rendered scene of one shape, image to image with a prompt of another colour
- inpainting: a rendered scene of one shape, a second one drawn into the masked right half
- interpolation: frames between two prompts that differ in their colour, also between two seeds
- hires fix: 64x64, where the model was not trained, enlarged to 128x128 and drawn again

Prints tables, and writes them.
"""

import io
import platform
import random
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from fidelity import load_model
from findings import Findings, versions
from PIL import Image

from sdbatch.advice import dtype_by_rule
from sdbatch.cores import cores
from sdbatch.engine.engine import Engine
from sdbatch.engine.request import Drawn, Request
from sdbatch.inputs.prepare import Prepared, prepare
from sdbatch.models.sd1.family import StableDiffusion1
from sdbatch.shapes import captions, judge, picture
from sdbatch.shapes.picture import Pixels
from sdbatch.shapes.vision import read_picture
from sdbatch.shapes.world import COLOURS, SHAPES, Group, Scene

GUIDANCE, STEPS, FRAME_STEPS, LANES = 2.5, 20, 8, 32
SIDE, SMALL = 128, 64  # pixels
STRENGTHS = (0.3, 0.5, 0.7, 0.8, 0.9)
FRAMES = 9
NEAR = 1 / 16  # of the picture: a shape this near to the source's is in the same place
ATTRIBUTES = ("colour", "shape", "count", "background")
FILLS: dict[str, dict[str, Any]] = {
    "the picture under the mask": {},
    "noise under the mask": {"mask_fill": "noise"},
    "the picture, compat: a1111": {"compat": "a1111"},
}
HIRES: dict[str, dict[str, Any]] = {
    "64x64": {"height": SMALL, "width": SMALL},
    **{
        f"64x64 to 128x128, {upscaler}, {strength:g}": {
            "height": SMALL,
            "width": SMALL,
            "hires_scale": 2.0,
            "hires_upscaler": upscaler,
            "hires_strength": strength,
        }
        for upscaler, strength in (("latent", 0.7), ("lanczos", 0.5))
    },
    "128x128": {},
}

Row = dict[str, str | float]  # by attribute, % of the images


@dataclass(frozen=True)
class Case:
    """A shape that a picture shows and what a prompt makes of it; all colours differ."""

    number: int
    shape: str
    colour: str
    other_shape: str
    other_colour: str
    background: str
    size: str

    def group(self, *, other: bool = False) -> Group:
        """Return the shape alone, or the one that is drawn next to it."""
        return Group(
            shape=self.other_shape if other else self.shape,
            colour=self.other_colour if other else self.colour,
            count=1,
            size=self.size,
            texture="plain",
        )

    def scene(self, *groups: Group, **where: Any) -> Scene:
        """Return a scene on the case's background."""
        return Scene(groups=groups, background=self.background, background_texture="plain", **where)

    def render(self, scene: Scene) -> Pixels:
        """Return the picture of a scene, always the same."""
        return picture.render(scene, random.Random(f"composition-{self.number}"))

    def caption(self, scene: Scene) -> str:
        """Return a prompt for a scene, always the same."""
        return captions.write_caption(scene, random.Random(f"composition-{self.number}"))

    def request(self, scene: Scene, **values: Any) -> Request:
        """Return a request of the scene's prompt."""
        defaults: dict[str, Any] = {
            "prompt": self.caption(scene),
            "seed": self.number,
            "sampler": "dpmpp_2m",
            "num_inference_steps": STEPS,
            "guidance_scale": GUIDANCE,
            "height": SIDE,
            "width": SIDE,
        }
        return Request(**{**defaults, **values})


def cases(count: int, sizes: Sequence[str]) -> list[Case]:
    """Return cases, always the same."""
    chance = random.Random("composition")
    found = []
    for number in range(count):
        colours = chance.sample(list(COLOURS), 3)
        shape, other = chance.sample(SHAPES, 2)
        size = chance.choice(sizes)
        found.append(Case(number, shape, colours[0], other, colours[1], colours[2], size))
    return found


def rates(verdicts: Sequence[dict[str, Any]]) -> Row:
    """Return how many of the images hold each of the attributes, in %."""
    return {
        name: round(100 * float(np.mean([verdict[name] for verdict in verdicts])), 1)
        for name in verdicts[0]
    }


def verdict_of(prompt: str, pixels: Pixels) -> dict[str, Any]:
    """Return what is right, and as `all` whether all of it is; what a prompt leaves open is."""
    verdict = judge.judge_picture(prompt, pixels)
    assert verdict is not None, prompt
    right = {name: verdict[name] is not False for name in ATTRIBUTES}
    return {"all": all(right.values()), **right}


def recolour(engine: Engine, count: int) -> dict[str, Row]:
    """Draw pictures of one shape again in another colour, by strength."""
    found = {}
    chosen = cases(count, ("medium", "large"))
    for strength in (*STRENGTHS, None):
        drawn: list[tuple[Request, Pixels, Future[Drawn]]] = []
        for case in chosen:
            source = case.render(case.scene(case.group(), place="center"))
            recoloured = replace(case.group(), colour=case.other_colour)
            values = {} if strength is None else {"strength": strength, "inputs": {"image": source}}
            request = case.request(case.scene(recoloured, place="center"), **values)
            drawn.append((request, source, engine.submit(request)))
        verdicts = []
        for request, source, future in drawn:
            image = future.result().image
            verdicts.append(
                {**verdict_of(request.prompt, image), "same place": _near(source, image)}
            )
        name = "without a picture" if strength is None else f"strength {strength:g}"
        found[name] = rates(verdicts)
    return found


def _near(source: Pixels, image: Pixels) -> bool:
    """Tell whether an image has one shape, where the source has its shape."""
    (there,), here = read_picture(source).shapes, read_picture(image).shapes
    return len(here) == 1 and max(abs(here[0].x - there.x), abs(here[0].y - there.y)) <= NEAR


def inpaint(engine: Engine, count: int) -> dict[str, Row]:
    """Draw a second shape into the masked right half of a picture, by what is under the mask."""
    found = {}
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[:, SIDE // 2 :] = 255
    for name, values in FILLS.items():
        drawn: list[tuple[Case, Request, Prepared, Future[Drawn]]] = []
        for case in cases(count, ("medium",)):
            source = case.render(case.scene(case.group(), place="left"))
            both = case.scene(case.group(), case.group(other=True), relation="left of")
            request = case.request(both, strength=1.0, **values)
            prepared = prepare(request, _file(source), _file(mask))
            request = request.model_copy(update={"inputs": prepared.arrays})
            drawn.append((case, request, prepared, engine.submit(request)))
        verdicts = []
        for case, request, prepared, future in drawn:
            image = prepared.finish(future.result().image)
            verdicts.append(_inpainted(case, request.prompt, image))
        found[name] = rates(verdicts)
    return found


def _inpainted(case: Case, prompt: str, image: Pixels) -> dict[str, Any]:
    source = case.render(case.scene(case.group(), place="left"))
    half = SIDE // 2
    there = [each for each in read_picture(image).shapes if each.x >= 0.5]
    shape = any(each.shape == case.other_shape for each in there)
    colour = any(each.colour == case.other_colour for each in there)
    right = any(
        (each.shape, each.colour) == (case.other_shape, case.other_colour) for each in there
    )
    return {
        "shape and colour there": right,
        "shape": shape,
        "colour": colour,
        "whole prompt": verdict_of(prompt, image)["all"],
        "other half bit-equal": np.array_equal(image[:, :half], source[:, :half]),
    }


def _file(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def interpolate(engine: Engine, count: int) -> dict[str, Row]:
    """Draw frames from a prompt to one of another colour, with one seed and between two."""
    found = {}
    for name, seeds in (("from prompt to prompt", 0), ("and from seed to seed", count)):
        drawn: list[tuple[Case, list[str], list[Future[Drawn]]]] = []
        for case in cases(count, ("medium", "large")):
            first = case.scene(case.group(), place="center")
            last = case.scene(replace(case.group(), colour=case.other_colour), place="center")
            futures = [
                engine.submit(
                    case.request(
                        first,
                        prompt_b=case.caption(last),
                        seed_b=case.number + seeds,
                        mix=frame / (FRAMES - 1),
                        num_inference_steps=FRAME_STEPS,
                    )
                )
                for frame in range(FRAMES)
            ]
            drawn.append((case, [case.caption(first), case.caption(last)], futures))
        found[name] = rates(
            [
                _interpolated(case, prompts, [future.result().image for future in futures])
                for case, prompts, futures in drawn
            ]
        )
    return found


def _interpolated(case: Case, prompts: list[str], images: list[Pixels]) -> dict[str, Any]:
    shapes = [read_picture(image).shapes for image in images]
    ends = [verdict_of(prompts[0], images[0])["all"], verdict_of(prompts[1], images[-1])["all"]]
    colours = [found[0].colour if len(found) == 1 else None for found in shapes]
    passed = [colour for i, colour in enumerate(colours) if not i or colour != colours[i - 1]]
    leads = passed[0] == case.colour and passed[-1] == case.other_colour
    return {
        "both ends right": all(ends),
        "first": ends[0],
        "last": ends[1],
        "colour changes once": passed == [case.colour, case.other_colour],
        "once or through one other": leads and len(passed) <= 3 and None not in passed,
        "one shape in all frames": all(len(found) == 1 for found in shapes),
        "the shape in all frames": all(
            [s.shape for s in found] == [case.shape] for found in shapes
        ),
    }


def enlarge(engine: Engine, count: int) -> dict[str, Row]:
    """Draw one shape at the size that the model is too small for, enlarged, and at its own."""
    found = {}
    for name, values in HIRES.items():
        drawn: list[tuple[Request, Future[Drawn]]] = []
        for case in cases(count, ("medium", "large")):
            request = case.request(case.scene(case.group(), place="center"), **values)
            drawn.append((request, engine.submit(request)))
        found[name] = rates(
            [verdict_of(request.prompt, future.result().image) for request, future in drawn]
        )
    return found


@click.command(help=__doc__)
@click.option("--images", default=100, show_default=True, help="Of each line of a table.")
@click.option("--threads", default=2, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), help="Where .json and .md go.")
def main(images: int, threads: int, output: Path | None) -> None:
    """Measure."""
    findings = Findings(output)
    dtype = dtype_by_rule("cpu")
    machine = f"{platform.machine()}, {cores()} cores, {dtype}"
    findings.add("machine", {"device": machine, "date": time.strftime("%Y-%m-%d"), **versions()})
    engine = Engine(StableDiffusion1(load_model(dtype)), lanes=LANES, threads=threads)
    each = f"{images} images each"
    findings.add(f"recolouring, % right, {each}, {STEPS} steps", recolour(engine, images))
    findings.add(f"inpainting, % right, {each}, {STEPS} steps", inpaint(engine, images))
    sequences = images // 2
    title = f"interpolation, % of {sequences} sequences of {FRAMES} frames, {FRAME_STEPS} steps"
    findings.add(title, interpolate(engine, sequences))
    findings.add(f"hires fix, % right, {each}, {STEPS} steps", enlarge(engine, images))
    engine.close()


if __name__ == "__main__":
    main()

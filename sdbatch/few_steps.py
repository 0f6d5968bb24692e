"""What models and LoRAs that were distilled to few steps must be drawn with; no torch here.

Sources: the model cards on the hub, as of 2026-11, of latent-consistency/lcm-lora-sdv1-5,
h1t/TCD-SD15-LoRA, ByteDance/Hyper-SD and wangfuyun/PCM_Weights.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from sdbatch import samplers

ALONE = ("lcm", "tcd")  # samplers that only distilled models were made for
_TRAILING = ("ddim_trailing", "tcd")  # the same steps; tcd's timesteps are multiples of 20
_NONE = (1.0, 1.0)  # guidance that was distilled into the weights, or is left out
_AS_NAMED = (0, 0)  # steps: the number in the name


@dataclass(frozen=True)
class Recipe:
    """How a distilled model is drawn, and what its name looks like."""

    title: str  # "an LCM"
    pattern: str  # of the name in lower case; a group is the number of steps
    samplers: tuple[str, ...]
    steps: tuple[int, int]  # from, to
    guidance: tuple[float, float]  # from, to

    def conflicts(self, values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """Yield the sampling keys that do not fit, each with what it must be."""
        if values["sampler"] not in self.samplers:
            yield "sampler", " or ".join(self.samplers)
        for key, bounds in (("num_inference_steps", self.steps), ("guidance_scale", self.guidance)):
            low, high = bounds
            if not low <= values[key] <= high:
                yield key, f"{low:g}" if low == high else f"{low:g} to {high:g}"


# The first whose pattern is found counts.
RECIPES = (
    Recipe("a Hyper-SD for guidance", r"hyper[-_ ]?sd.*?(?<!\d)(\d+)[-_ ]?steps?[-_ ]?cfg",
           _TRAILING, _AS_NAMED, (5, 8)),
    Recipe("a Hyper-SD for 1 to 8 steps", r"hyper[-_ ]?sd.*?(?<!\d)1[-_ ]?step",
           ("tcd",), (1, 8), _NONE),
    Recipe("a Hyper-SD", r"hyper[-_ ]?sd.*?(?<!\d)(\d+)[-_ ]?step", _TRAILING, _AS_NAMED, _NONE),
    Recipe("a PCM for guidance", r"(?<![a-z])pcm(?![a-z]).*normalcfg_(\d+)step",
           ("ddim_trailing", "euler"), _AS_NAMED, (2, 9)),
    Recipe("a PCM", r"(?<![a-z])pcm(?![a-z]).*smallcfg_(\d+)step",
           ("ddim_trailing", "euler"), _AS_NAMED, (1, 2)),
    Recipe("a TCD", r"(?<![a-z])tcd(?![a-z])", ("tcd",), (2, 50), _NONE),
    Recipe("an LCM", r"(?<![a-z])lcm(?![a-z])", ("lcm",), (1, 8), (1, 2)),
)  # fmt: skip
LCM, TCD = RECIPES[-1], RECIPES[-2]


@dataclass(frozen=True)
class Distilled:
    """A part of a model that was distilled to few steps."""

    where: str  # its key in the job
    recipe: Recipe
    evidence: str  # what it was recognised by
    lora: str | None = None  # by this name rows choose it; None: all rows have it
    certain: bool = False  # it says so itself; otherwise its name does

    def applies(self, loras: Mapping[str, float]) -> bool:
        """Return whether a row has it that chooses these LoRAs with these weights."""
        return self.lora is None or bool(loras.get(self.lora))

    def __str__(self) -> str:
        return f"{self.where}, {self.recipe.title} by {self.evidence}"


def find_recipe(name: str) -> Recipe | None:
    """Return how what has this name is drawn; None if the name does not say that it is distilled.

    Args:
        name: of a file or a hub id, or a title.
    """
    for recipe in RECIPES:
        if found := re.search(recipe.pattern, name.casefold()):
            steps = (int(found[1]),) * 2 if found.groups() else recipe.steps
            return replace(recipe, steps=steps)
    return None


def needs_distilled(sampler: str) -> bool:
    """Return whether a sampler draws well only with a distilled model."""
    return samplers.split(sampler)[0] in (samplers.SAMPLERS[name] for name in ALONE)

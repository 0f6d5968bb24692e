"""What the parts of gpu.py share: the sizes of what is measured, the models, the results."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import models
import torch
from findings import Findings

from sdbatch.engine.request import Request
from sdbatch.models.build import Build
from sdbatch.models.sd1.loading import Model, assemble

FEW, GUIDANCE = "lcm", 7.5  # the sampler of the fewest steps; the scale of the others


@dataclass(frozen=True)
class Setting:
    """A model, a device, and the sizes of what is measured."""

    name: str  # of models.SIZES
    device: str
    dtype: str
    steps: tuple[int, int, int]  # the last without guidance, as for models of few steps
    images: tuple[int, int, int]  # for each of the steps
    batches: tuple[int, ...]  # of diffusers
    rows: tuple[int, ...]  # of UNet calls, with channels_last
    decodes: tuple[int, ...]  # images of VAE calls
    lanes: tuple[int, int]
    matmul: int  # rows and columns of the matrices
    tune: bool  # compile diffusers with autotuning

    @property
    def pixels(self) -> int:
        """Return the side of an image."""
        return models.SIZES[self.name].pixels

    @property
    def mixed_images(self) -> int:
        """Return the images of a batch of different requests."""
        return self.images[1]


FULL = Setting(
    name="sd15",
    device="cuda",
    dtype="float16",
    steps=(50, 25, 4),
    images=(32, 32, 128),
    batches=(4, 8, 16, 32),  # 32 decoded at once take some 13 GB
    rows=(2, 4, 8, 16, 32, 64, 128),
    decodes=(1, 2, 4, 8),
    lanes=(32, 64),
    matmul=8192,
    tune=True,
)
SMALL = Setting(
    name="tiny",
    device="cpu",
    dtype="float32",
    steps=(4, 3, 2),
    images=(4, 4, 4),
    batches=(2, 4),
    rows=(2, 4),
    decodes=(1, 2),
    lanes=(8, 16),  # a decoding of four images, as places has it: one shape to compile
    matmul=256,
    tune=False,
)


@dataclass
class Bench:
    """What the parts share."""

    setting: Setting
    found: Findings
    ceiling: float = 0.0  # TFLOP/s of matrix products in the setting's dtype, by `machine`
    models: dict[str, Model] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Return the device."""
        return torch.device(self.setting.device)

    def model(self, layout: str) -> Model:
        """Return the model, in "NHWC" or "NCHW"; the same one on every call."""
        if layout not in self.models:
            self.models[layout] = self.build(channels_last=layout == "NHWC")
        return self.models[layout]

    def build(self, dtype: str | None = None, **build: bool) -> Model:
        """Return a model of its own: the same weights, laid out as `build` says."""
        setting = self.setting
        dtype = dtype or setting.dtype
        parts = models.parts(setting.name, setting.device, getattr(torch, dtype))
        return assemble(parts, Build(setting.device, dtype, **build))

    def requests(self, at: int, count: int | None = None) -> list[Request]:
        """Return requests of `setting.steps[at]` that differ in prompt and seed alone."""
        setting = self.setting
        few = at == len(setting.steps) - 1
        return [
            Request(
                prompt=f"a photograph of a dog, number {i}",
                seed=i,
                sampler=FEW if few else "dpmpp_2m",
                num_inference_steps=setting.steps[at],
                guidance_scale=1.0 if few else GUIDANCE,
                height=setting.pixels,
                width=setting.pixels,
            )
            for i in range(setting.images[at] if count is None else count)
        ]

    def mixed(self, count: int) -> list[Request]:
        """Return requests whose steps, sampler and guidance vary; the same ones on every call."""
        draw = random.Random(0)
        most = self.setting.steps[1]
        return [
            request.updated(
                sampler=draw.choice(["ddim", "euler", "dpmpp_2m", "unipc"]),
                num_inference_steps=draw.randint(most // 3 + 1, most),
                guidance_scale=1.0 if i % 3 == 0 else GUIDANCE,
            )
            for i, request in enumerate(self.requests(1, count))
        ]


@dataclass(frozen=True)
class Work:
    """What a part computes on the device, for the plan of its seconds."""

    lane_steps: float = 0  # rows of UNet calls
    images: float = 0  # decoded

    def __add__(self, other: "Work") -> "Work":
        """Return both together."""
        return Work(self.lane_steps + other.lane_steps, self.images + other.images)

    def __mul__(self, times: float) -> "Work":
        """Return it several times."""
        return Work(self.lane_steps * times, self.images * times)


@dataclass(frozen=True)
class Part:
    """A part of the benchmark, which may fail alone."""

    name: str
    run: Callable[[Bench], None]
    work: Callable[[Setting], Work]
    fixed_s: float  # loading, compiling, starting processes
    compiled: bool = False
    by_default: bool = True


def drawn(setting: Setting, *at: int) -> Work:
    """Return the work of all images of `setting.steps[at]`, each drawn once."""
    few = len(setting.steps) - 1
    return Work(
        sum(setting.images[i] * setting.steps[i] * (1 if i == few else 2) for i in at),
        sum(setting.images[i] for i in at),
    )

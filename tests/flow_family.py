"""A small flow-matching family, unlike Stable Diffusion 1.x in all that a family decides.

Another scheduler (no input scaling, a shift by image size), 3 latent channels, factor 4, two
conditions, another cache, and a request's input picture. With random weights; saved as a folder,
loaded through the registry as any other family (`register`).
"""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file
from torch import nn

from sdbatch import registry
from sdbatch.engine.family import Original, Pictures
from sdbatch.engine.limits import Capacity, ModelLimits
from sdbatch.models.find_model import Layout

CHANNELS, FACTOR = 3, 4
TOKENS, WIDTH, POOLED = 16, 24, 12
MOST_STEPS = 500
PIPELINE = "TinyFlowPipeline"
REWRITES = ()
LIMITS = ModelLimits(
    multiple_of=FACTOR, side=64, capacity={"cpu": Capacity(8, 8), "cuda": Capacity(8, 8)}
)
LAYOUT = Layout(weights=("denoiser",), configs=("scheduler",))


def register(monkeypatch) -> None:
    """Add the family, with the one line that a family needs."""
    monkeypatch.setitem(registry.FAMILIES, PIPELINE, __name__)


def write_folder(path: Path, seed: int = 0) -> None:
    """Write a model with random weights at `path`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        weights = Denoiser().state_dict()
    (path / "denoiser").mkdir(parents=True)
    save_file(weights, path / "denoiser" / "model.safetensors")
    (path / "denoiser" / "config.json").write_text("{}")
    FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).save_pretrained(path / "scheduler")
    (path / "model_index.json").write_text(json.dumps({"_class_name": PIPELINE}))


def load(files, build):
    denoiser = Denoiser()
    denoiser.load_state_dict(load_file(Path(files.root) / "denoiser" / "model.safetensors"))
    return TinyFlow(denoiser, torch.device(build.device), getattr(torch, build.dtype))


class Denoiser(nn.Module):
    """Latents, a time, text and a pooled vector to a velocity; and latents to a picture."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(256, WIDTH)
        self.first = nn.Conv2d(CHANNELS, 16, 3, padding=1)
        self.time = nn.Linear(1, 16)
        self.text = nn.Linear(WIDTH, 16)
        self.pooled = nn.Linear(POOLED, 16)
        self.last = nn.Conv2d(16, CHANNELS, 3, padding=1)
        self.picture = nn.Conv2d(CHANNELS, 3, 3, padding=1)

    def forward(self, latents, times, text, pooled, cache=None):
        hidden = self.first(latents)
        if cache:
            added = cache["added"]
        else:
            added = self.time(times[:, None]) + self.text(text).mean(1) + self.pooled(pooled)
        if cache is not None:
            cache["added"] = added
        return self.last(torch.tanh(hidden + added[:, :, None, None]))


@dataclass(frozen=True)
class TinyReading:
    prompt: bytes
    negative: bytes
    colour: tuple[float, float, float]  # of the input picture
    tokens: int
    truncated: bool
    lanes: int = 2
    pictures: dict = field(default_factory=dict)  # its input picture is a condition
    original: Original | None = None

    def at(self, tick):
        return self


class FlowScheduler:
    """FlowMatchEulerDiscreteScheduler, whose latents need no scaling."""

    def __init__(self, scheduler, first, device) -> None:
        self._scheduler = scheduler
        self._first = first
        self.timesteps = scheduler.timesteps[first:].float().to(device)

    def start(self, noise):
        return noise

    def noised(self, latents, noise, step):
        sigma = self._scheduler.sigmas[self._first + step]
        return (1 - sigma) * latents + sigma * noise

    def model_input(self, latents, step):
        return latents

    def step(self, answer, step, latents):
        timestep = self._scheduler.timesteps[self._first + step]
        return self._scheduler.step(answer, timestep, latents, return_dict=False)[0]

    def clean(self, model_input, answer, step):
        return model_input - self._scheduler.sigmas[self._first + step] * answer

    def answer(self, model_input, clean, step):
        return (model_input - clean) / self._scheduler.sigmas[self._first + step]


class TinyFlow:
    limits = LIMITS
    keys = frozenset({"negative_prompt", "cache_interval"})
    compiled = False

    def __init__(self, denoiser, device, dtype) -> None:
        self.device, self.dtype = device, dtype
        self._denoiser = denoiser.to(device, dtype).requires_grad_(False).eval()

    def read(self, request):
        prompt, negative = request.prompt.encode(), request.negative_prompt.encode()
        colour = (0.0, 0.0, 0.0)
        if (picture := request.inputs.get("image")) is not None:
            if picture.shape != (request.height, request.width, 3):
                raise ValueError(f"image = {picture.shape}: must have the image's height and width")
            colour = tuple(float(c) for c in np.asarray(picture).mean((0, 1)) / 255)
        too_long = len(prompt) > TOKENS or (request.guided and len(negative) > TOKENS)
        pictures = {}
        if request.second_pass and request.inputs:
            pictures = {"second": request.inputs["image"]}
        return TinyReading(
            prompt[:TOKENS], negative[:TOKENS], colour, len(prompt), too_long, pictures=pictures
        )

    def shape(self, request, reading):
        return (request.height, request.width, request.cache_interval)

    def noise(self, request, generator):
        size = (1, CHANNELS, request.height // FACTOR, request.width // FACTOR)
        return torch.randn(size, generator=generator)[0]

    def sigmas(self, request):
        if request.sampler != "euler":
            raise ValueError(f"sampler = {request.sampler!r}: must be euler for this model")
        if request.num_inference_steps > MOST_STEPS:
            steps = request.num_inference_steps
            raise ValueError(f"num_inference_steps = {steps}: must be at most {MOST_STEPS}")
        first = self._scheduler(request)[1]
        # 1 at first: noise alone
        noise = self._scheduler(request)[0].sigmas[first:-1].double().numpy()
        return noise / np.maximum(1 - noise, 0.01)

    def scheduler(self, requests, noise, generators):
        return FlowScheduler(*self._scheduler(requests[0]), self.device)

    def _scheduler(self, request):
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        # larger images keep more noise
        shift = 0.5 + request.height // FACTOR * (request.width // FACTOR) / 512
        steps, first = request.num_inference_steps, 0
        if request.second_pass:
            steps, first = request.steps_from_picture()
        scheduler.set_timesteps(steps, mu=shift)
        scheduler.set_begin_index(first)
        return scheduler, first

    def encode(self, pixels):
        size = (pixels.shape[1] // FACTOR, pixels.shape[2] // FACTOR)
        values = pixels.to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        return nn.functional.adaptive_avg_pool2d(values, size)

    def with_pictures(self, request, reading, encoded):
        return replace(reading, pictures={}, original=Original(encoded["second"]))

    def embed(self, readings, soon):
        return (
            self._conditions([(each.prompt, each.colour) for each in readings]),
            self._conditions([(each.negative, each.colour) for each in readings]),
        )

    def _conditions(self, texts):
        rows = [[*text, *[0] * (TOKENS - len(text))] for text, _ in texts]
        pooled = [
            [sum(row) / 4096, *colour, *[0.0] * (POOLED - 4)]
            for row, (_, colour) in zip(rows, texts, strict=True)
        ]
        # one by one: an embedding must not depend on the number of rows
        text = torch.stack([self._denoiser.tokens(torch.tensor(row)) for row in rows])
        return {"text": text, "pooled": torch.tensor(pooled, dtype=self.dtype)}

    def denoise(self, latents, timesteps, conditions, cache=None, first_lanes=None):
        times = (timesteps / 1000).to(self.dtype)
        return self._denoiser(
            latents.to(self.dtype), times, conditions["text"], conditions["pooled"], cache
        )

    def decode(self, latents, dtype):
        weights = {name: w.to(dtype) for name, w in self._denoiser.picture.state_dict().items()}
        layer = self._denoiser.picture
        pictures = torch.func.functional_call(layer, weights, latents.to(dtype)).float()
        finite = pictures.isfinite().flatten(1).all(1)
        pictures = torch.sigmoid(pictures).nan_to_num()
        pictures = nn.functional.interpolate(pictures, scale_factor=FACTOR)
        pixels = (pictures.permute(0, 2, 3, 1) * 255).round().to(torch.uint8)
        return Pictures(pixels.contiguous(), finite)

"""The sides that gpu.py compares: diffusers as its users run it, and the engine.

A side draws requests of one kind. `model_ms` times single calls of a model's UNet and VAE.
"""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from oracle import pipeline

from sdbatch.engine.engine import Engine
from sdbatch.engine.request import Request
from sdbatch.models.schedulers import make_scheduler
from sdbatch.models.sd1.family import StableDiffusion1
from sdbatch.models.sd1.loading import Model

# https://huggingface.co/docs/diffusers/optimization/fp16, "torch.compile"
INDUCTOR = {
    "conv_1x1_as_mm": True,
    "coordinate_descent_tuning": True,
    "epilogue_fusion": False,
    "coordinate_descent_check_all_directions": True,
}


class Side(Protocol):
    """One way to draw."""

    def draw(self, requests: list[Request]) -> None:
        """Draw all requests: alike but for prompt and seed; the engine takes any of one size."""

    def close(self) -> None:
        """Stop."""


@contextlib.contextmanager
def own_algorithms() -> Iterator[None]:
    """Let cuDNN choose among all its algorithms, as torch does by default and sdbatch does not."""
    deterministic = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = False
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = deterministic


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that queued work counts."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def draw_alike(pipe: Any, model: Model, group: list[Request]) -> NDArray[np.uint8]:
    """Draw requests that differ in prompt and seed alone in one call of diffusers' pipeline.

    The device rounds the pixels, and a quarter of the bytes is copied to the CPU: its users get
    floats or PIL images, which takes longer.

    Returns:
        (n, H, W, 3), as diffusers rounds them.
    """
    first = group[0]
    pipe.scheduler = make_scheduler(
        first.sampler, model.scheduler_config, first.num_inference_steps
    )
    images: torch.Tensor = pipe(
        [request.prompt for request in group],
        num_inference_steps=first.num_inference_steps,
        guidance_scale=first.guidance_scale,
        height=first.height,
        width=first.width,
        generator=[torch.Generator().manual_seed(request.seed) for request in group],
        output_type="pt",
    ).images
    assert len(images) == len(group)
    pixels = (images.permute(0, 2, 3, 1).float() * 255).round().to(torch.uint8)
    return pixels.cpu().numpy()


class Diffusers:
    """StableDiffusionPipeline in batches of `batch`, eager or compiled, NCHW or NHWC.

    With `sliced` its VAE decodes one image after the other.
    """

    def __init__(
        self,
        model: Model,
        batch: int,
        *,
        sliced: bool = False,
        compiled: bool = False,
        tune: bool = True,
    ) -> None:
        self.batch = batch
        self._model = model
        self._sliced = sliced
        if compiled:
            options: dict[str, Any] = {"mode": "max-autotune"} if tune else {}
            if tune:
                for name, value in INDUCTOR.items():
                    setattr(torch._inductor.config, name, value)
            model.unet.fuse_qkv_projections()
            model.unet.compile(fullgraph=True, dynamic=False, **options)
            model.vae.decode = torch.compile(
                model.vae.decode, fullgraph=True, dynamic=False, **options
            )
        self._pipe = pipeline(model)

    def draw(self, requests: list[Request]) -> None:
        """Draw in batches; the last one is filled up, as only one shape is compiled."""
        for start in range(0, len(requests), self.batch):
            group = requests[start : start + self.batch]
            group += group[:1] * (self.batch - len(group))
            self._model.vae.use_slicing = self._sliced  # others may use the same VAE
            try:
                with own_algorithms():
                    draw_alike(self._pipe, self._model, group)
            finally:
                self._model.vae.use_slicing = False

    def close(self) -> None:
        """Do nothing, as nothing runs."""


class Ours:
    """The engine; measures the device's time in its UNet and VAE calls."""

    def __init__(self, model: Model, lanes: int) -> None:
        self._device = model.device
        self._spans: list[Any] = []
        family: Any = StableDiffusion1(model)
        family.denoise = self._timed(family.denoise)
        family.decode = self._timed(family.decode)
        self.engine = Engine(family, lanes=lanes, threads=torch.get_num_threads())

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            began = self._mark()
            answer = call(*args)
            self._spans.append((began, self._mark()))
            return answer

        return timed

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def busy_seconds(self) -> float:
        """Return the device's seconds in calls of the model since the last call of this method."""
        spans, self._spans = self._spans, []
        if self._device.type != "cuda":
            return float(sum(end - began for began, end in spans))
        torch.cuda.synchronize()
        return float(sum(began.elapsed_time(end) for began, end in spans)) / 1000

    def draw(self, requests: list[Request]) -> None:
        """Draw all requests."""
        for future in [self.engine.submit(request) for request in requests]:
            future.result()

    def close(self) -> None:
        """Stop the engine."""
        self.engine.close()


def median_seconds(call: Callable[[], Any], device: torch.device, repeats: int = 5) -> float:
    """Return the median seconds of `call`, warmed up."""
    call()
    seconds = []
    for _ in range(repeats):
        synchronize(device)
        began = time.perf_counter()
        call()
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


@torch.inference_mode()
def model_ms(
    model: Model, rows: int, images: int, pixels: int, repeats: int = 5
) -> tuple[float, float]:
    """Return milliseconds: the UNet for each of `rows`, the VAE for each of `images`."""
    device, dtype, side = model.device, model.dtype, pixels // 8
    width = model.unet.config.cross_attention_dim
    latents = torch.randn(rows, 4, side, side, device=device, dtype=dtype)
    latents = latents.to(memory_format=model.layout)
    times = torch.full((rows,), 500.0, device=device)
    context = torch.randn(rows, 77, width, device=device, dtype=dtype)
    unet = median_seconds(
        lambda: model.unet(latents, times, encoder_hidden_states=context, return_dict=False),
        device,
        repeats,
    )
    few = latents[:1].expand(images, -1, -1, -1).contiguous(memory_format=model.layout)
    vae = median_seconds(lambda: model.vae.decode(few, return_dict=False), device, repeats)
    return 1000 * unet / rows, 1000 * vae / images

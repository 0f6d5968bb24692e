"""Loading a model's parts from a hub id, a folder or a single file, with diffusers' own loaders."""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors import SafetensorError
from transformers import CLIPTextModel, CLIPTokenizer

from sdbatch.engine import builtin, checkpoint
from sdbatch.engine.checkpoint import ModelFiles
from sdbatch.errors import ModelError

# What diffusers, transformers and safetensors raise for files that are no model.
_FAULTS = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RuntimeError,
    SafetensorError,
)


@dataclass(frozen=True)
class Model:
    """The parts that draw, on their device."""

    tokenizer: Any
    text_encoder: Any
    unet: Any
    vae: Any
    scheduler_config: dict[str, Any]
    device: torch.device
    dtype: torch.dtype


def load(files: ModelFiles, device: str, dtype: str) -> Model:
    """Load the model onto `device` ("cpu", "cuda") with weights in `dtype` ("float32", ...).

    Raises:
        ModelError: the files are not a Stable Diffusion model that diffusers can load.
    """
    weights = getattr(torch, dtype)
    try:
        parts = _from_file(files, weights) if files.kind == "file" else _from_folder(files, weights)
    except _FAULTS as error:
        text = " ".join(str(error).split())[:300]
        raise ModelError(
            f"model.path = {files.path!r}: cannot be loaded ({type(error).__name__}: {text}). "
            f"It must be a whole Stable Diffusion model, with a single file's config within reach."
        ) from error
    for name in checkpoint.PARTS:
        parts[name] = parts[name].to(device).requires_grad_(False).eval()
    return Model(**parts, device=torch.device(device), dtype=weights)


def _from_folder(files: ModelFiles, dtype: torch.dtype) -> dict[str, Any]:
    path = str(builtin.folder(files.path)) if files.kind == "builtin" else files.path
    where = {"revision": files.revision} if files.kind == "hub" else {}
    return {
        "tokenizer": CLIPTokenizer.from_pretrained(path, subfolder="tokenizer", **where),
        "text_encoder": CLIPTextModel.from_pretrained(
            path, subfolder="text_encoder", dtype=dtype, **where
        ),
        "unet": UNet2DConditionModel.from_pretrained(path, subfolder="unet", dtype=dtype, **where),
        "vae": AutoencoderKL.from_pretrained(path, subfolder="vae", dtype=dtype, **where),
        "scheduler_config": DDIMScheduler.load_config(path, subfolder="scheduler", **where),
    }


def _from_file(files: ModelFiles, dtype: torch.dtype) -> dict[str, Any]:
    from diffusers import StableDiffusionPipeline  # here: half a second, needed for this kind only

    pipe = StableDiffusionPipeline.from_single_file(
        files.path, config=files.config, dtype=dtype, safety_checker=None, feature_extractor=None
    )
    parts: dict[str, Any] = {name: getattr(pipe, name) for name in ("tokenizer", *checkpoint.PARTS)}
    return {**parts, "scheduler_config": dict(pipe.scheduler.config)}

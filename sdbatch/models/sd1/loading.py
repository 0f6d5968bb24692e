"""Loads a model's parts from a hub id, a folder or a single file, with diffusers' own loaders."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTokenizer

from sdbatch.errors import ModelError
from sdbatch.job import Model as ModelSettings
from sdbatch.models import pickles
from sdbatch.models.build import Build
from sdbatch.models.find_model import ModelFiles
from sdbatch.models.sd1 import LAYOUT, adapters
from sdbatch.models.sd1.row_loras import Networks, RowLoras
from sdbatch.models.weights import check_weights, load_complete, load_errors

_EMA = "model_ema."  # before the averaged weights of the original full checkpoints


@dataclass(frozen=True)
class Model:
    """The parts of a model, on their device."""

    tokenizer: Any
    text_encoder: Any
    unet: Any
    vae: Any
    scheduler_config: dict[str, Any]
    device: torch.device
    dtype: torch.dtype
    layout: torch.memory_format
    has_embeddings: bool  # the tokenizer may know words that stand for several tokens
    row_loras: RowLoras  # attached to the text encoder and the UNet


def load(files: ModelFiles, build: Build) -> Model:
    """Load the model as `build` says.

    Raises:
        ModelError: the files are not a Stable Diffusion model that diffusers can load.
    """
    dtype = getattr(torch, build.dtype)
    whole = "It must be a complete Stable Diffusion model; a single file needs its model.config."
    with load_errors("model.path", files.path, whole):
        parts = _from_file(files, dtype) if files.kind == "file" else _from_folder(files, dtype)
        for name in files.layout.weights:
            check_weights(parts[name], name)
    _check_unet(parts["unet"], files.path)
    adapters.add_embeddings(parts, files.settings)
    networks = adapters.fuse_loras(parts, files.settings)
    return assemble(
        parts,
        build,
        has_embeddings=bool(files.settings.embeddings),
        row_loras=networks,
        lora_weights=files.settings.row_loras,
    )


def assemble(
    parts: dict[str, Any],
    build: Build,
    *,
    has_embeddings: bool = False,
    row_loras: Networks = MappingProxyType({}),
    lora_weights: Mapping[str, float] = MappingProxyType({}),
) -> Model:
    """Put the loaded `parts`, named as Model's fields and of the dtype, onto the device.

    Args:
        parts: of the model.
        build: how it is laid out.
        has_embeddings: see Model.
        row_loras: the LoRAs that rows can choose.
        lora_weights: of each of them where a row gives none.
    """
    parts = dict(parts)
    layout = torch.channels_last if build.channels_last else torch.contiguous_format
    for name in LAYOUT.weights:
        part = parts[name].to(build.device).requires_grad_(False)
        parts[name] = (
            part.eval() if name == "text_encoder" else part.eval().to(memory_format=layout)
        )
    loras = RowLoras(row_loras, lora_weights, parts["text_encoder"], compiled=build.compile)
    if build.compile:
        _compile(parts, fuse_projections=not row_loras)
    return Model(
        **parts,
        device=torch.device(build.device),
        dtype=getattr(torch, build.dtype),
        layout=layout,
        has_embeddings=has_embeddings,
        row_loras=loras,
    )


def _from_folder(files: ModelFiles, dtype: torch.dtype) -> dict[str, Any]:
    path = files.root
    where: dict[str, Any] = {"revision": files.revision} if files.kind == "hub" else {}
    weights = {**where, "dtype": dtype, "variant": files.settings.variant}
    if files.settings.vae is None:
        vae = load_complete(AutoencoderKL, path, subfolder="vae", **weights)
    else:
        own = AutoencoderKL.load_config(path, subfolder="vae", **where)
        vae = adapters.load_vae(files.settings.vae, own, dtype)
    return {
        "tokenizer": CLIPTokenizer.from_pretrained(path, subfolder="tokenizer", **where),
        "text_encoder": load_complete(CLIPTextModel, path, subfolder="text_encoder", **weights),
        "unet": load_complete(UNet2DConditionModel, path, subfolder="unet", **weights),
        "vae": vae,
        "scheduler_config": _trained_as(
            DDIMScheduler.load_config(path, subfolder="scheduler", **where), files.settings
        ),
    }


def _from_file(files: ModelFiles, dtype: torch.dtype) -> dict[str, Any]:
    from diffusers import StableDiffusionPipeline  # here: half a second, needed for this kind only

    components: dict[str, Any] = {"safety_checker": None, "feature_extractor": None}
    if files.settings.vae is not None:
        own = AutoencoderKL.load_config(files.settings.config, subfolder="vae")
        components["vae"] = adapters.load_vae(files.settings.vae, own, dtype)
    if files.settings.ema and _has_averages(Path(files.path)):
        components["unet"] = UNet2DConditionModel.from_single_file(
            _averaged(Path(files.path)), config=files.settings.config, subfolder="unet", dtype=dtype
        )
    pipe = StableDiffusionPipeline.from_single_file(
        files.path, config=files.settings.config, dtype=dtype, **components
    )
    parts: dict[str, Any] = {
        name: getattr(pipe, name) for name in ("tokenizer", *files.layout.weights)
    }
    return {**parts, "scheduler_config": _trained_as(dict(pipe.scheduler.config), files.settings)}


def _has_averages(file: Path) -> bool:
    first = f"{_EMA}diffusion_model"  # a file may hold nothing but the averaging's own numbers
    return any(name.startswith(first) for name in pickles.tensor_names(file, "model.path"))


def _averaged(file: Path) -> dict[str, torch.Tensor]:
    """Return the UNet's averaged weights of a full checkpoint."""
    if file.suffix == ".safetensors":
        weights = load_file(file)
    else:
        weights = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        weights = weights.get("state_dict", weights)
    return {
        key: weights[_EMA + key.removeprefix("model.").replace(".", "")]
        for key in weights
        if key.startswith("model.diffusion_model.")
    }


def _trained_as(config: dict[str, Any], settings: ModelSettings) -> dict[str, Any]:
    """Return the scheduler's configuration with the job's settings of how the model was trained."""
    config = dict(config)
    if settings.prediction_type is not None:
        config["prediction_type"] = settings.prediction_type
    if settings.zero_snr is not None:
        config["rescale_betas_zero_snr"] = settings.zero_snr
        if settings.zero_snr:  # such a model needs its last timestep too
            config["timestep_spacing"] = "trailing"
    return config


def _check_unet(unet: Any, path: str) -> None:
    """Reject a UNet with inputs that Stable Diffusion 1.x does not have; diffusers ignores them."""
    config = unet.config
    if config.in_channels != 4 or config.time_cond_proj_dim or config.addition_embed_type:
        raise ModelError(
            f"model.path = {path!r}: its UNet needs more than text and latents (in_channels "
            f"{config.in_channels}, time_cond_proj_dim {config.time_cond_proj_dim}, "
            f"addition_embed_type {config.addition_embed_type}): must be a Stable Diffusion 1.x "
            f"for text to image. Use the LoRA of an LCM, in model.loras."
        )


def _compile(parts: dict[str, Any], *, fuse_projections: bool) -> None:
    """Compile the UNet and the decoder, each shape when it is first drawn.

    Deterministic, without autotuning: choices by timing, and so bits, differ from actor to actor.
    """
    options: dict[str, Any] = {"deterministic": True}
    if fuse_projections:  # LoRAs by row are attached to each projection
        parts["unet"].fuse_qkv_projections()
    parts["unet"] = torch.compile(parts["unet"], fullgraph=True, dynamic=False, options=options)
    vae = parts["vae"]
    vae.decode = torch.compile(vae.decode, fullgraph=True, dynamic=False, options=options)

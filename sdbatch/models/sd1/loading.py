"""Loads a model's parts from a hub id, a folder or a single file, with diffusers' own loaders."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm
from transformers import CLIPTextModel, CLIPTokenizer

from sdbatch.errors import ModelError
from sdbatch.job import Model as ModelSettings
from sdbatch.job.files import with_paths
from sdbatch.models import clip_vocabulary, extra_files, fp8_linears
from sdbatch.models.build import Build
from sdbatch.models.find_model import ModelFiles
from sdbatch.models.identify import AVERAGED_PREFIX, TEXT_PREFIX, UNET_PREFIX, averaged_name
from sdbatch.models.sd1 import LAYOUT, adapters, blocks, check_unet, extras, rewrites
from sdbatch.models.sd1.rewrites import TextProjection
from sdbatch.models.sd1.row_loras import Networks, RowLoras
from sdbatch.models.sd1.shared_prefix import SharedPrefix
from sdbatch.models.sd1.tiling import wrap_edges
from sdbatch.models.weights import (
    check_finite,
    check_weights,
    load_complete,
    load_errors,
    read_weights,
    whole,
)

_PADDING = 64  # rows that a text encoder may have beyond its words: trainers pad to multiples
_CONV_IN = f"{UNET_PREFIX}input_blocks.0.0.weight"
_TEXT = f"{TEXT_PREFIX}transformer."
_TEXT_PARTS = ("embeddings.", "encoder.", "final_layer_norm.")


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
    row_loras: RowLoras  # attached to the text encoder and the UNet
    build: Build  # how it is laid out
    tiling: bool = False  # the opposite edges of a picture are neighbours
    text_projection: TextProjection | None = None  # None: the UNet projects the text itself
    shared_prefix: SharedPrefix | None = None  # None: the UNet computes each lane by itself

    def call_unet(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        text: torch.Tensor,
        first_lanes: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Return the UNet's answer, (lanes, C, h, w).

        Args:
            latents: (lanes, C, h, w), of the UNet's type and layout.
            timesteps: (lanes,).
            text: (lanes, L, D).
            first_lanes: see engine.family.Family.denoise.
        """
        if self.shared_prefix is not None:
            return self.shared_prefix(latents, timesteps, text, first_lanes or ())
        answer: torch.Tensor = self.unet(
            latents, timesteps, encoder_hidden_states=text, return_dict=False
        )[0]
        return answer


def load(files: ModelFiles, build: Build) -> Model:
    """Load the model as `build` says.

    Raises:
        ModelError: the files are not a Stable Diffusion model that diffusers can load.
    """
    dtype = getattr(torch, build.dtype)
    settings = with_paths(files.settings, lambda file: extra_files.local(file.path, file.kind))
    must = "It must be a complete Stable Diffusion model. Download it again, or choose another."
    with load_errors("model.path", files.path, must):
        own = _from_file if files.kind == "file" else _from_folder
        parts = own(files, settings, dtype)
        for name in files.layout.weights:
            check_weights(parts[name], name)
            parts[name] = parts[name].to(build.device)
            check_finite(parts[name], name)
        _check_vocabulary(parts["tokenizer"], parts["text_encoder"])
    _check_unet(parts["unet"], files.path)
    adapters.add_embeddings(parts, settings)
    networks = adapters.fuse_loras(parts, settings)
    if settings.loras:
        with load_errors("model.loras", files.path, "Leave out the LoRA at fault."):
            check_finite(parts["unet"], "unet")
            check_finite(parts["text_encoder"], "text_encoder")
    return assemble(
        parts,
        build,
        row_loras=networks,
        lora_weights=settings.row_loras,
        tiling=settings.tiling,
    )


def assemble(
    parts: dict[str, Any],
    build: Build,
    *,
    row_loras: Networks = MappingProxyType({}),
    lora_weights: Mapping[str, float] = MappingProxyType({}),
    tiling: bool = False,
) -> Model:
    """Put the loaded `parts`, named as Model's fields and of the dtype, onto the device.

    Args:
        parts: of the model.
        build: how it is laid out.
        row_loras: the LoRAs that rows can choose.
        lora_weights: of each of them where a row gives none.
        tiling: whether the opposite edges of a picture are neighbours.
    """
    parts = dict(parts)
    layout = torch.channels_last if build.channels_last else torch.contiguous_format
    for name in LAYOUT.weights:
        part = parts[name].to(build.device).requires_grad_(False)
        parts[name] = (
            part.eval() if name == "text_encoder" else part.eval().to(memory_format=layout)
        )
    if tiling:
        wrap_edges(parts["unet"])
        wrap_edges(parts["vae"])
    blocks.replace(parts["unet"])
    blocks.replace(parts["vae"].decoder)
    parts["row_loras"] = RowLoras(
        row_loras, lora_weights, parts["text_encoder"], compiled=build.compile
    )
    adapted = {layer for network in row_loras.values() for layer in network}
    rewrites.apply(parts, build.rewrites, adapted)
    if build.compile and not row_loras and "text_projection" not in parts:
        parts["unet"].fuse_qkv_projections()  # LoRAs by row and text_kv need each projection
    if build.fp8_linears:
        fp8_linears.quantize(parts["unet"])
    if build.compile:
        _compile(parts)
    return Model(
        **parts,
        device=torch.device(build.device),
        dtype=getattr(torch, build.dtype),
        layout=layout,
        build=build,
        tiling=tiling,
    )


def _from_folder(files: ModelFiles, settings: ModelSettings, dtype: torch.dtype) -> dict[str, Any]:
    path = files.root
    where: dict[str, Any] = {"revision": files.revision} if files.kind == "hub" else {}

    def load_part(kind: Any, part: str) -> Any:
        variant = files.variants.get(part)
        return load_complete(kind, path, subfolder=part, dtype=dtype, variant=variant, **where)

    if settings.vae is None:
        vae = load_part(AutoencoderKL, "vae")
    else:
        own = AutoencoderKL.load_config(path, subfolder="vae", **where)
        vae = extras.load_vae(settings.vae, own, dtype)
    return {
        "tokenizer": CLIPTokenizer.from_pretrained(path, subfolder="tokenizer", **where),
        "text_encoder": load_part(CLIPTextModel, "text_encoder"),
        "unet": load_part(UNet2DConditionModel, "unet"),
        "vae": vae,
        "scheduler_config": _trained_as(
            DDIMScheduler.load_config(path, subfolder="scheduler", **where), settings
        ),
    }


def _from_file(files: ModelFiles, settings: ModelSettings, dtype: torch.dtype) -> dict[str, Any]:
    weights, config = read_weights(files.path), files.config
    own = AutoencoderKL.load_config(config, subfolder="vae")
    if settings.vae is None:
        vae = extras.vae_of(weights, own, dtype)
    else:
        vae = extras.load_vae(settings.vae, own, dtype)
    unet_weights = _unet_weights(weights, averaged=settings.ema)
    with whole("unet"):
        unet = UNet2DConditionModel.from_single_file(
            unet_weights,
            config=config,
            subfolder="unet",
            dtype=dtype,
            in_channels=unet_weights[_CONV_IN].shape[1],
        )
    with whole("text_encoder"):
        text_encoder = create_diffusers_clip_model_from_ldm(
            CLIPTextModel,
            _text_weights(weights),
            subfolder="text_encoder",
            config=config,
            torch_dtype=dtype,
        )
    scheduler = DDIMScheduler.load_config(config, subfolder="scheduler")
    return {
        "tokenizer": _load_tokenizer(config),
        "text_encoder": text_encoder,
        "unet": unet,
        "vae": vae,
        "scheduler_config": _trained_as(scheduler, settings),
    }


def _unet_weights(weights: dict[str, Any], *, averaged: bool) -> dict[str, Any]:
    """Return the UNet's weights of a checkpoint; the averaged ones if it holds them."""
    names = [name for name in weights if name.startswith(UNET_PREFIX)]
    averaged &= any(name.startswith(f"{AVERAGED_PREFIX}diffusion_model") for name in weights)
    return {name: weights[averaged_name(name) if averaged else name] for name in names}


def _text_weights(weights: dict[str, Any]) -> dict[str, Any]:
    """Return the text encoder's weights of a checkpoint; NovelAI's names lack `text_model.`."""
    found = {name: value for name, value in weights.items() if name.startswith(_TEXT)}
    return {
        f"{_TEXT}text_model.{name.removeprefix(_TEXT)}"
        if name.removeprefix(_TEXT).startswith(_TEXT_PARTS)
        else name: value
        for name, value in found.items()
    }


def _load_tokenizer(config: str) -> Any:
    merges = Path(config) / "tokenizer" / clip_vocabulary.FILE
    if merges.is_file():
        return clip_vocabulary.load_tokenizer(merges)
    return CLIPTokenizer.from_pretrained(config, subfolder="tokenizer")


def _check_vocabulary(tokenizer: Any, text_encoder: Any) -> None:
    """Reject a tokenizer of another vocabulary; transformers makes up one if files are missing."""
    words, rows = len(tokenizer), text_encoder.get_input_embeddings().num_embeddings
    if not words <= rows < words + _PADDING:
        raise ValueError(
            f"its tokenizer has {words} words and its text encoder {rows}: they must be of one "
            f"model"
        )


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
    try:
        check_unet(unet.config)
    except ValueError as error:
        raise ModelError(f"model.path = {path!r}: {error}. Choose another model.") from error


def _compile(parts: dict[str, Any]) -> None:
    """Compile the UNet and the decoder, each shape when it is first drawn.

    Deterministic, without autotuning: choices by timing, and so bits, differ from actor to actor.
    """
    options: dict[str, Any] = {"deterministic": True}
    parts["unet"] = torch.compile(parts["unet"], fullgraph=True, dynamic=False, options=options)
    vae = parts["vae"]
    vae.decode = torch.compile(vae.decode, fullgraph=True, dynamic=False, options=options)

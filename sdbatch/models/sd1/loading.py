"""Loading a model's parts from a hub id, a folder or a single file, with diffusers' own loaders."""

import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTokenizer

from sdbatch.errors import ModelError
from sdbatch.models import find_model, pickles
from sdbatch.models.find_model import Extras, ModelFiles
from sdbatch.models.sd1 import adapters

_EMA = "model_ema."  # before the averaged weights of the original full checkpoints


@dataclass(frozen=True)
class Model:
    """The parts that draw, on their device."""

    tokenizer: Any
    text_encoder: Any
    unet: Any
    vae: Any
    checker: Any  # a safety_checker.SafetyChecker, or None
    scheduler_config: dict[str, Any]
    device: torch.device
    dtype: torch.dtype
    layout: torch.memory_format
    has_embeddings: bool  # the tokenizer may know words that stand for several tokens


@dataclass(frozen=True)
class Build:
    """How the parts are laid out on the device. All of it can change bits."""

    device: str  # "cpu", "cuda"
    dtype: str  # of the weights: "float32", ...
    channels_last: bool = False
    compile: bool = False


def load(files: ModelFiles, build: Build) -> Model:
    """Load the model as `build` says.

    Raises:
        ModelError: the files are not a Stable Diffusion model that diffusers can load, or not the
            one that the driver found.
    """
    _check_same(files)
    dtype = getattr(torch, build.dtype)
    whole = "It must be a whole Stable Diffusion model, with a single file's config within reach."
    with adapters.named("model.path", files.path, whole):
        parts = _from_file(files, dtype) if files.kind == "file" else _from_folder(files, dtype)
        for name in find_model.PARTS:
            adapters.refuse_missing(parts[name], name)
    _refuse_unknown(parts["unet"], files.path)
    adapters.fuse(parts, files.extras)
    checker = _checker(files, build)
    return assemble(parts, build, checker=checker, has_embeddings=bool(files.extras.embeddings))


def _check_same(files: ModelFiles) -> None:
    own = None if files.same is None else find_model.sha256(files)
    if own != files.same:
        raise ModelError(
            f"model.path = {files.path}: its sha256 is {own} on {socket.gethostname()}, and "
            f"{files.same} where the job began. Install the same sdbatch on all machines."
        )


def assemble(
    parts: dict[str, Any], build: Build, *, checker: Any = None, has_embeddings: bool = False
) -> Model:
    """Put the loaded `parts`, named as Model's fields and of the dtype, onto the device."""
    parts = dict(parts)
    layout = torch.channels_last if build.channels_last else torch.contiguous_format
    for name in find_model.PARTS:
        part = parts[name].to(build.device).requires_grad_(False)
        parts[name] = (
            part.eval() if name == "text_encoder" else part.eval().to(memory_format=layout)
        )
    if build.compile:
        _compile(parts)
    return Model(
        **parts,
        checker=checker,
        device=torch.device(build.device),
        dtype=getattr(torch, build.dtype),
        layout=layout,
        has_embeddings=has_embeddings,
    )


def _from_folder(files: ModelFiles, dtype: torch.dtype) -> dict[str, Any]:
    path = files.root
    where: dict[str, Any] = {"revision": files.revision} if files.kind == "hub" else {}
    weights = {**where, "dtype": dtype, "variant": files.extras.variant}
    if files.extras.vae is None:
        vae = adapters.whole(AutoencoderKL, path, subfolder="vae", **weights)
    else:
        own = AutoencoderKL.load_config(path, subfolder="vae", **where)
        vae = adapters.load_vae(files.extras.vae, own, dtype)
    return {
        "tokenizer": CLIPTokenizer.from_pretrained(path, subfolder="tokenizer", **where),
        "text_encoder": adapters.whole(CLIPTextModel, path, subfolder="text_encoder", **weights),
        "unet": adapters.whole(UNet2DConditionModel, path, subfolder="unet", **weights),
        "vae": vae,
        "scheduler_config": _asked(
            DDIMScheduler.load_config(path, subfolder="scheduler", **where), files.extras
        ),
    }


def _from_file(files: ModelFiles, dtype: torch.dtype) -> dict[str, Any]:
    from diffusers import StableDiffusionPipeline  # here: half a second, needed for this kind only

    given: dict[str, Any] = {"safety_checker": None, "feature_extractor": None}
    if files.extras.vae is not None:
        own = AutoencoderKL.load_config(files.config, subfolder="vae")
        given["vae"] = adapters.load_vae(files.extras.vae, own, dtype)
    if files.extras.ema and _has_averages(Path(files.path)):
        given["unet"] = UNet2DConditionModel.from_single_file(
            _averaged(Path(files.path)), config=files.config, subfolder="unet", dtype=dtype
        )
    pipe = StableDiffusionPipeline.from_single_file(
        files.path, config=files.config, dtype=dtype, **given
    )
    parts: dict[str, Any] = {name: getattr(pipe, name) for name in ("tokenizer", *find_model.PARTS)}
    return {**parts, "scheduler_config": _asked(dict(pipe.scheduler.config), files.extras)}


def _has_averages(file: Path) -> bool:
    first = f"{_EMA}diffusion_model"  # a file may have kept the averaging's own numbers alone
    return any(name.startswith(first) for name in pickles.names(file, "model.path"))


def _averaged(file: Path) -> dict[str, torch.Tensor]:
    """Return the UNet's weights of a full checkpoint, averaged over its training."""
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


def _asked(config: dict[str, Any], extras: Extras) -> dict[str, Any]:
    """Return the scheduler's configuration with what the job says of the model's training."""
    config = dict(config)
    if extras.prediction_type is not None:
        config["prediction_type"] = extras.prediction_type
    if extras.zero_snr is not None:
        config["rescale_betas_zero_snr"] = extras.zero_snr
        if extras.zero_snr:  # such a model must be asked at its last timestep too
            config["timestep_spacing"] = "trailing"
    return config


def _checker(files: ModelFiles, build: Build) -> Any:
    extras = files.extras
    if extras.checker is None:
        return None
    from sdbatch.models import safety_checker  # here: diffusers' checker takes time to import

    path, where = extras.checker, {}
    if extras.checker == find_model.OWN:
        path = files.path
        where = {"subfolder": find_model.CHECKER, "variant": find_model.checker_variant(files)}
        where |= {"revision": files.revision} if files.kind == "hub" else {}
    with adapters.named("safety.checker", path, "It must be whole; or set safety.checker to none."):
        checker = safety_checker.load(path, **where)
    return checker.to(build.device, getattr(torch, build.dtype))


def _refuse_unknown(unet: Any, path: str) -> None:
    """Refuse a UNet that takes more than Stable Diffusion 1.x gives it, which diffusers ignores."""
    config = unet.config
    if config.in_channels != 4 or config.time_cond_proj_dim or config.addition_embed_type:
        raise ModelError(
            f"model.path = {path!r}: its UNet takes more than text and latents (in_channels "
            f"{config.in_channels}, time_cond_proj_dim {config.time_cond_proj_dim}, "
            f"addition_embed_type {config.addition_embed_type}), so it is no Stable Diffusion 1.x "
            f"for text to image. An LCM is used as its LoRA, in model.loras."
        )


def _compile(parts: dict[str, Any]) -> None:
    """Compile what takes the time, when a shape is first drawn (see allow_many_shapes).

    Deterministic, without autotuning: choices by timing, and so bits, differ from actor to actor.
    """
    options: dict[str, Any] = {"deterministic": True}
    parts["unet"].fuse_qkv_projections()
    parts["unet"] = torch.compile(parts["unet"], fullgraph=True, dynamic=False, options=options)
    vae = parts["vae"]
    vae.decode = torch.compile(vae.decode, fullgraph=True, dynamic=False, options=options)


def allow_many_shapes() -> None:
    """Let the calling thread compile any number of shapes: after eight torch would refuse."""
    torch._dynamo.config.recompile_limit = 10_000
    torch._dynamo.config.accumulated_recompile_limit = 10_000

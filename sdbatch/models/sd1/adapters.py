"""What stands beside a model and goes into it: another VAE, textual inversions, LoRAs."""

import pickle
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler
from diffusers.loaders.single_file_utils import SingleFileComponentError
from safetensors import SafetensorError
from safetensors.torch import load_file

from sdbatch.errors import ModelError
from sdbatch.models.find_model import Extras

# What diffusers, transformers, peft and safetensors raise for files that are no model.
_FAULTS = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RuntimeError,
    SafetensorError,
    SingleFileComponentError,
    pickle.UnpicklingError,
)

_LATENTS = {"latent_channels": 4, "scaling_factor": 0.18215, "shift_factor": None}  # SD 1.x's


@contextmanager
def named(where: str, path: str, must: str) -> Iterator[None]:
    """Turn what a library raises for the file `path` into one line, which the key `where` begins.

    Raises:
        ModelError: `must` says what the file has to be.
    """
    try:
        yield
    except _FAULTS as error:
        text = " ".join(str(error).split())[:300]
        raise ModelError(
            f"{where} = {path!r}: cannot be loaded ({type(error).__name__}: {text}). {must}"
        ) from error


def load_vae(path: str, own: dict[str, Any], dtype: torch.dtype) -> Any:
    """Load a VAE from a folder, or from a file in the original layout with the shape of `own`."""
    with named("model.vae", path, "It must be a VAE of the model's shape."):
        if Path(path).is_dir():
            vae = whole(AutoencoderKL, path, dtype=dtype)
        else:
            with tempfile.TemporaryDirectory() as folder:
                AutoencoderKL.from_config(own).save_config(folder)
                vae = AutoencoderKL.from_single_file(path, config=folder, dtype=dtype)
        refuse_missing(vae, "it")
        for name, usual in _LATENTS.items():
            if vae.config[name] != own.get(name, usual):
                raise ValueError(f"its {name} is {vae.config[name]}, not {own.get(name, usual)}")
        if len(vae.config.block_out_channels) != len(own["block_out_channels"]):
            raise ValueError("it makes latents of another size than the model's")
        return vae


def whole(kind: Any, path: str, **where: Any) -> Any:
    """Load a part; refuse one that lacks weights, which the libraries make up at random."""
    loaded, info = kind.from_pretrained(path, output_loading_info=True, **where)
    if info["missing_keys"]:
        raise ValueError(f"lacks {', '.join(sorted(info['missing_keys']))}")
    return loaded


def refuse_missing(part: Any, name: str) -> None:
    """Refuse a part of which weights were never loaded, as a single file may leave them."""
    if any(weight.is_meta for weight in part.parameters()):
        raise ValueError(f"{name} lacks weights")


def fuse(parts: dict[str, Any], extras: Extras) -> None:
    """Add the embeddings' words, and fuse the LoRAs into the weights in the order given."""
    if not extras.loras and not extras.embeddings:
        return
    from diffusers import StableDiffusionPipeline  # here: half a second, rarely needed

    models = {name: parts[name] for name in ("tokenizer", "text_encoder", "unet", "vae")}
    pipe = StableDiffusionPipeline(
        **models,
        scheduler=DDIMScheduler.from_config(parts["scheduler_config"]),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    for number, (file, word) in enumerate(extras.embeddings):
        must = "It must be a textual inversion of the model's text width, and its word a new one."
        with named(f"model.embeddings.{number}.path", file, must):
            pipe.load_textual_inversion(file, token=word)
    for number, (file, _) in enumerate(extras.loras):
        with named(f"model.loras.{number}.path", file, "It must be a LoRA for this model."):
            _load_lora(pipe, file, f"lora{number}")
    if extras.loras:
        names = [f"lora{number}" for number in range(len(extras.loras))]
        pipe.set_adapters(names, [weight for _, weight in extras.loras])
        pipe.fuse_lora(adapter_names=names)
        pipe.unload_lora_weights()


def _load_lora(pipe: Any, file: str, name: str) -> None:
    """Load a LoRA as the adapter `name`; refuse one of which a layer does not fit the model."""
    given = _with_alphas(file)
    weights, *_ = pipe.lora_state_dict(given if isinstance(given, str) else dict(given))
    pipe.load_lora_weights(given, adapter_name=name)
    fitting = [
        weight
        for part in (pipe.unet, pipe.text_encoder)
        for weight, _ in part.named_parameters()
        if f".{name}." in weight
    ]
    asked = [weight for weight in weights if not weight.endswith(".alpha")]
    if len(fitting) != len(asked):
        raise ValueError(f"{len(asked) - len(fitting)} of its {len(asked)} weights fit no layer")


def _with_alphas(file: str) -> str | dict[str, torch.Tensor]:
    """Return the file, or where it is of kohya's layout its weights with the alphas multiplied in.

    diffusers (0.42) takes the commonest alpha for all layers: wrong where they differ.
    """
    weights: dict[str, torch.Tensor] = load_file(file)
    alphas = [name for name in weights if name.endswith(".alpha")]
    for name in alphas:
        layer = name.removesuffix(".alpha")
        down, up = f"{layer}.lora_down.weight", f"{layer}.lora_up.weight"
        if down in weights:
            weights[up] = weights[up] * (weights.pop(name).item() / weights[down].shape[0])
    return weights if alphas else file

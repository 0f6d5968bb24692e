"""What stands beside a model and goes into it: another VAE, textual inversions, LoRAs."""

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

from sdbatch.engine.checkpoint import Extras
from sdbatch.errors import ModelError

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
)


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
            return AutoencoderKL.from_pretrained(path, dtype=dtype)
        with tempfile.TemporaryDirectory() as folder:
            AutoencoderKL.from_config(own).save_config(folder)
            return AutoencoderKL.from_single_file(path, config=folder, dtype=dtype)


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
            pipe.load_lora_weights(_lora(file), adapter_name=f"lora{number}")
            if f"lora{number}" not in {n for of in pipe.get_list_adapters().values() for n in of}:
                raise ValueError("no layer of it is the model's")
    if extras.loras:
        names = [f"lora{number}" for number in range(len(extras.loras))]
        pipe.set_adapters(names, [weight for _, weight in extras.loras])
        pipe.fuse_lora(adapter_names=names)
        pipe.unload_lora_weights()


def _lora(file: str) -> dict[str, torch.Tensor]:
    """Read a LoRA's weights, with the alphas of kohya's layout multiplied into them.

    diffusers (0.42) takes the commonest alpha for all layers: wrong where they differ.
    """
    weights: dict[str, torch.Tensor] = load_file(file)
    for name in [name for name in weights if name.endswith(".alpha")]:
        layer = name.removesuffix(".alpha")
        down, up = f"{layer}.lora_down.weight", f"{layer}.lora_up.weight"
        if down in weights:
            weights[up] = weights[up] * (weights.pop(name).item() / weights[down].shape[0])
    return weights

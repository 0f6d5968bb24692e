"""VAE, textual inversions and LoRAs that are applied to a model."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler
from safetensors.torch import load_file

from sdbatch.job import Model
from sdbatch.models.weights import check_weights, load_complete, load_errors

_LATENTS = {"latent_channels": 4, "scaling_factor": 0.18215, "shift_factor": None}  # SD 1.x's


def load_vae(path: str, own: dict[str, Any], dtype: torch.dtype) -> Any:
    """Load a VAE from a folder, or from a file in the original layout with the shape of `own`."""
    with load_errors("model.vae", path, "It must be a VAE of the model's shape."):
        if Path(path).is_dir():
            vae = load_complete(AutoencoderKL, path, dtype=dtype)
        else:
            with tempfile.TemporaryDirectory() as folder:
                AutoencoderKL.from_config(own).save_config(folder)
                vae = AutoencoderKL.from_single_file(path, config=folder, dtype=dtype)
        check_weights(vae, "the VAE")
        for name, usual in _LATENTS.items():
            if vae.config[name] != own.get(name, usual):
                raise ValueError(f"its {name} is {vae.config[name]}, not {own.get(name, usual)}")
        if len(vae.config.block_out_channels) != len(own["block_out_channels"]):
            raise ValueError("its latents have another size than the model's")
        return vae


def fuse(parts: dict[str, Any], settings: Model) -> None:
    """Add the embeddings' words, and fuse the LoRAs into the weights in the order given."""
    if not settings.loras and not settings.embeddings:
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
    for number, embedding in enumerate(settings.embeddings):
        must = "It must be a textual inversion of the model's text width, and its word a new one."
        with load_errors(f"model.embeddings.{number}.path", embedding.path, must):
            pipe.load_textual_inversion(embedding.path, token=embedding.token)
    for number, lora in enumerate(settings.loras):
        must = "It must be a LoRA for this model."
        with load_errors(f"model.loras.{number}.path", lora.path, must):
            _load_lora(pipe, lora.path, f"lora{number}")
    if settings.loras:
        names = [f"lora{number}" for number in range(len(settings.loras))]
        pipe.set_adapters(names, [lora.weight for lora in settings.loras])
        pipe.fuse_lora(adapter_names=names)
        pipe.unload_lora_weights()


def _load_lora(pipe: Any, file: str, name: str) -> None:
    """Load a LoRA as the adapter `name`; reject it if a layer does not fit the model."""
    source = _with_alphas(file)
    weights, *_ = pipe.lora_state_dict(source if isinstance(source, str) else dict(source))
    pipe.load_lora_weights(source, adapter_name=name)
    fitting = [
        weight
        for part in (pipe.unet, pipe.text_encoder)
        for weight, _ in part.named_parameters()
        if f".{name}." in weight
    ]
    expected = [weight for weight in weights if not weight.endswith(".alpha")]
    if len(fitting) != len(expected):
        raise ValueError(
            f"{len(expected) - len(fitting)} of its {len(expected)} weights fit no layer"
        )


def _with_alphas(file: str) -> str | dict[str, torch.Tensor]:
    """Return the file, or of a file in kohya's layout the weights multiplied by their alphas.

    diffusers (0.42) uses the commonest alpha for all layers: wrong if they differ.
    """
    weights: dict[str, torch.Tensor] = load_file(file)
    alphas = [name for name in weights if name.endswith(".alpha")]
    for name in alphas:
        layer = name.removesuffix(".alpha")
        down, up = f"{layer}.lora_down.weight", f"{layer}.lora_up.weight"
        if down in weights:
            weights[up] = weights[up] * (weights.pop(name).item() / weights[down].shape[0])
    return weights if alphas else file

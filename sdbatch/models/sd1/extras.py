"""Files that a job names besides a Stable Diffusion 1.x, as tensors: VAE, embedding."""

import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from sdbatch.models.extra_files import folder_variant
from sdbatch.models.identify import TINY_VAE, VAE_PREFIX
from sdbatch.models.weights import (
    check_finite,
    check_weights,
    load_complete,
    load_errors,
    read_weights,
    whole,
)

_LATENTS = {"latent_channels": 4, "scaling_factor": 0.18215, "shift_factor": None}  # SD 1.x's
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_NAME = re.compile(rf"(\.attentions\.\d+\.)({'|'.join(_OLD_ATTENTION)})\.")


def load_vae(path: str, own: dict[str, Any], dtype: torch.dtype) -> Any:
    """Load a VAE from a folder, or from a file with the shape of the configuration `own`."""
    with load_errors("model.vae", path, "It must be a VAE of the model's shape."):
        if Path(path).is_dir():
            variant = folder_variant(Path(path))
            named = AutoencoderKL.load_config(path)["_class_name"]
            kind = AutoencoderTiny if named == "AutoencoderTiny" else AutoencoderKL
            vae = load_complete(kind, path, dtype=dtype, variant=variant)
        else:
            weights = read_weights(path)
            is_tiny = any(re.search(TINY_VAE, name) for name in weights)
            vae = _tiny_vae_of(weights, dtype) if is_tiny else vae_of(weights, own, dtype)
        # a tiny VAE takes the latents as the UNet gives them: its scaling_factor is 1
        names = ("latent_channels",) if isinstance(vae, AutoencoderTiny) else tuple(_LATENTS)
        for name in names:
            expected = own.get(name, _LATENTS[name])
            if vae.config[name] != expected:
                raise ValueError(f"its {name} is {vae.config[name]}, not {expected}")
        if len(vae.config.block_out_channels) != len(own["block_out_channels"]):
            raise ValueError("its latents have another size than the model's")
        check_finite(vae, "vae")
        return vae


def _tiny_vae_of(weights: dict[str, Any], dtype: torch.dtype) -> Any:
    """Build a TAESD of the usual size from its file, in diffusers' layout or the original one.

    A file without the encoder is enough: nothing is encoded. Its decoder's layers count from 1, as
    the first of them, which bounds the latents, has no weights.
    Source: madebyollin/taesd, taesd.py.
    """
    vae = AutoencoderTiny()
    if not any(name.startswith("decoder.layers.") for name in weights):
        numbered = {name.removeprefix("taesd_decoder."): value for name, value in weights.items()}
        weights = {
            f"decoder.layers.{int(number) - 1}.{rest}": value
            for name, value in numbered.items()
            for number, _, rest in [name.partition(".")]
            if number.isdecimal()
        }
    if not any(name.startswith("encoder.") for name in weights):
        vae.encoder = None
    vae.load_state_dict(weights)
    return vae.to(dtype)


def vae_of(weights: dict[str, Any], config: dict[str, Any], dtype: torch.dtype) -> Any:
    """Build a VAE of weights in diffusers' layout, old or new, or in the original one.

    Args:
        weights: of a VAE, or of a checkpoint that holds one.
        config: its configuration.
        dtype: of the VAE.

    Raises:
        ValueError: weights are missing.
    """
    if any(name.startswith(VAE_PREFIX) for name in weights):
        weights = {
            name.removeprefix(VAE_PREFIX): value
            for name, value in weights.items()
            if name.startswith(VAE_PREFIX)
        }
    named = {
        _OLD_NAME.sub(lambda found: f"{found[1]}{_OLD_ATTENTION[found[2]]}.", name): value
        for name, value in weights.items()
        if name.startswith(("encoder.", "decoder.", "quant_conv.", "post_quant_conv."))
    }
    with tempfile.TemporaryDirectory() as folder, whole("the VAE"):
        AutoencoderKL.from_config(config).save_config(folder)
        vae = AutoencoderKL.from_single_file(named, config=folder, dtype=dtype)
    check_weights(vae, "the VAE")
    return vae


def read_embedding(path: str, token: str) -> torch.Tensor:
    """Return the vectors (n, D) of a textual inversion; of several words in a file, of `token`.

    Layouts: AUTOMATIC1111's (string_to_param, emb_params), diffusers' (the word), a bare tensor.
    """
    content = read_weights(path)
    words = content.get("string_to_param", content)
    vectors = words[token] if token in words else words.get("*", words.get("emb_params"))
    if vectors is None:
        (vectors,) = (value for value in words.values() if isinstance(value, torch.Tensor))
    found: torch.Tensor = vectors.detach()
    return found if found.ndim == 2 else found[None]

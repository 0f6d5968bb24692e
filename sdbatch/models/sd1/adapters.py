"""Textual inversions and fused LoRAs: what changes a model when it is loaded."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DDIMScheduler

from sdbatch.job import Model
from sdbatch.models.sd1.extras import read_embedding
from sdbatch.models.sd1.layers import Layer, layers_of
from sdbatch.models.sd1.networks import LayerNetwork, read_network
from sdbatch.models.sd1.row_loras import Networks
from sdbatch.models.weights import check_finite, load_errors


def add_embeddings(parts: dict[str, Any], settings: Model) -> None:
    """Add the words of the textual inversions to the tokenizer and the text encoder."""
    if not settings.embeddings:
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
            vectors = read_embedding(embedding.path, embedding.token)
            pipe.load_textual_inversion({embedding.token: vectors}, token=embedding.token)
            check_finite(parts["text_encoder"], "text_encoder")


def fuse_loras(parts: dict[str, Any], settings: Model) -> Networks:
    """Fuse the LoRAs without a name into the weights, in the order given; return the others."""
    layers = layers_of(parts["unet"], parts["text_encoder"]) if settings.loras else {}
    named: dict[str, Mapping[Layer, LayerNetwork]] = {}
    for number, lora in enumerate(settings.loras):
        must = "It must be a LoRA for this model."
        with load_errors(f"model.loras.{number}.path", lora.path, must):
            network = read_network(lora.path, layers)
            if lora.name is None:
                _fuse(network, lora.weight)
                continue
            named[lora.name] = network
    return named


def _fuse(network: Mapping[Layer, LayerNetwork], strength: float) -> None:
    for layer, part in network.items():
        delta, bias = part.delta(layer)
        weight = layer.weight.data
        layer.weight.data = (_for_sum(weight) + strength * delta).to(weight)
        if bias is not None:
            own = torch.zeros_like(bias) if layer.bias is None else _for_sum(layer.bias.data)
            layer.bias = torch.nn.Parameter((own + strength * bias).to(weight))


def _for_sum(weight: torch.Tensor) -> torch.Tensor:
    return weight.to("cpu", torch.float32)

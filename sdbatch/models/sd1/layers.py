"""The layers that a LoRA can change, by the names that files give them.

A name has "_" for "." and no prefix: trainers write down_blocks.0.attentions.0 of diffusers, or
input_blocks.1.1 of the original release, with either separator and with many prefixes.
"""

import re
from collections.abc import Iterator
from typing import Any, TypeAlias

import torch

Layer: TypeAlias = torch.nn.Linear | torch.nn.Conv2d | torch.nn.GroupNorm | torch.nn.LayerNorm

_PREFIX = re.compile(
    r"(?:lora_unet_|lora_te_|lycoris_|(?:model_)?diffusion_model_|unet_|text_encoder_"
    r"|cond_stage_model_transformer_|(?:text_encoders_)?clip_l_transformer_)?"
    r"(?:base_model_model_)?(?:text_model_)?"
)
_PLAIN = {  # diffusers' names of the layers outside of blocks -> the original release's
    "conv_in": "input_blocks_0_0",
    "conv_norm_out": "out_0",
    "conv_out": "out_2",
    "time_embedding_linear_1": "time_embed_0",
    "time_embedding_linear_2": "time_embed_2",
}
_RESNET = {
    "norm1": "in_layers_0",
    "conv1": "in_layers_2",
    "norm2": "out_layers_0",
    "conv2": "out_layers_3",
    "time_emb_proj": "emb_layers_1",
    "conv_shortcut": "skip_connection",
}
_TEXT_ATTENTION = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


def plain_name(name: str) -> str:
    """Return the name of a layer in a file as a key of `layers_of`."""
    underscored = name.replace(".", "_").replace("_processor_", "_")
    return _PREFIX.sub("", underscored, count=1)


def layers_of(unet: Any, text_encoder: Any) -> dict[str, Layer]:
    """Return the layers of a model by all their names."""
    layers: dict[str, Layer] = {}
    original = {**_PLAIN, **dict(_block_names(unet))}
    for name, layer in _named_layers(unet):
        layers[name] = layer
        if name.endswith("_to_out_0"):  # diffusers' own LoRAs before peft
            layers[name.removesuffix("_0")] = layer
        for ours, theirs in original.items():
            if name == ours or name.startswith(f"{ours}_"):
                rest = name.removeprefix(ours).removeprefix("_")
                if "_resnets_" in ours:
                    rest = _RESNET[rest]
                layers[f"{theirs}_{rest}" if rest else theirs] = layer
    for name, layer in _named_layers(text_encoder):
        name = name.removeprefix("text_model_")
        layers[name] = layer
        for ours, theirs in _TEXT_ATTENTION.items():
            if name.endswith(f"_{ours}"):
                layers[name.removesuffix(ours) + theirs] = layer
    return layers


def _named_layers(part: Any) -> Iterator[tuple[str, Layer]]:
    for name, module in part.named_modules():
        if isinstance(module, Layer):
            yield name.replace(".", "_"), module


def _block_names(unet: Any) -> Iterator[tuple[str, str]]:
    """Yield diffusers' names of the parts of the blocks, each with the original release's."""
    number = 1
    for level, block in enumerate(unet.down_blocks):
        for i in range(len(block.resnets)):
            yield f"down_blocks_{level}_resnets_{i}", f"input_blocks_{number}_0"
            yield f"down_blocks_{level}_attentions_{i}", f"input_blocks_{number}_1"
            number += 1
        if block.downsamplers:
            yield f"down_blocks_{level}_downsamplers_0_conv", f"input_blocks_{number}_0_op"
            number += 1
    yield "mid_block_resnets_0", "middle_block_0"
    yield "mid_block_attentions_0", "middle_block_1"
    yield "mid_block_resnets_1", "middle_block_2"
    number = 0
    for level, block in enumerate(unet.up_blocks):
        for i in range(len(block.resnets)):
            yield f"up_blocks_{level}_resnets_{i}", f"output_blocks_{number}_0"
            yield f"up_blocks_{level}_attentions_{i}", f"output_blocks_{number}_1"
            number += 1
        place = 2 if getattr(block, "attentions", None) else 1
        yield f"up_blocks_{level}_upsamplers_0", f"output_blocks_{number - 1}_{place}"

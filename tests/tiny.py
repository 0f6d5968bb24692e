"""The tiny test model: random weights in the real classes of Stable Diffusion 1.5.

Written in a second, in diffusers' layout (`write_folder`) and as one file in the key layout of the
original Stable Diffusion release (`write_file`).
"""

import json
import re
from pathlib import Path

import torch
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

TEXT_WIDTH = 32
MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


PIPELINES = {  # by the channels of the UNet's input
    4: "StableDiffusionPipeline",
    9: "StableDiffusionInpaintPipeline",
    8: "StableDiffusionInstructPix2PixPipeline",
}


def write_folder(path: Path, seed: int = 0, channels: int = 4) -> None:
    """Write a random Stable Diffusion 1.5 in small at `path`, in diffusers' layout.

    Args:
        path: of the folder.
        seed: of its weights.
        channels: of the UNet's input: 9 for inpainting, 8 for editing.
    """
    tokenizer = byte_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = {
            "unet": _random_unet(channels),
            "vae": _random_vae(),
            "text_encoder": _random_text_encoder(tokenizer),
            "tokenizer": tokenizer,
            "scheduler": PNDMScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                skip_prk_steps=True,
                set_alpha_to_one=False,
                steps_offset=1,
            ),
        }
    for name, part in parts.items():
        part.save_pretrained(path / name)
    index = MODEL_INDEX | {"_class_name": PIPELINES[channels]}
    (path / "model_index.json").write_text(json.dumps(index, indent=2))


def _random_unet(channels: int = 4) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=64,
        in_channels=channels,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def _random_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16, 16, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
    )


def _random_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def byte_tokenizer() -> CLIPTokenizer:
    """Return CLIP's tokenizer with a vocabulary of bytes, each also as the end of a word."""
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def write_file(folder: Path, path: Path) -> None:
    """Write the model in `folder` as one .safetensors or .ckpt file in the original layout."""
    config = json.loads((folder / "unet" / "config.json").read_text())
    unet = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    vae = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    text = load_file(folder / "text_encoder" / "model.safetensors")
    weights = {f"model.diffusion_model.{k}": v for k, v in _unet(unet, config).items()}
    weights |= {f"first_stage_model.{k}": v for k, v in _vae(vae).items()}
    weights |= {f"cond_stage_model.transformer.{_text(k)}": v for k, v in text.items()}
    weights = {name: tensor.contiguous() for name, tensor in weights.items()}
    if path.suffix == ".ckpt":
        torch.save({"state_dict": weights, "global_step": 1}, path)
    else:
        save_file(weights, path)


def _text(key: str) -> str:
    return key if key.startswith("text_model.") else f"text_model.{key}"


def _unet(weights, config):
    """Name a UNet2DConditionModel's weights as Stable Diffusion's openaimodel.py does."""
    layers = config["layers_per_block"]
    levels = len(config["block_out_channels"])
    renamed = {}
    for key, value in weights.items():
        renamed[_unet_key(key, layers, levels)] = value
    return renamed


def _unet_key(key: str, layers: int, levels: int) -> str:
    plain = {
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
    }
    for ours, theirs in plain.items():
        if key.startswith(f"{ours}."):
            return key.replace(ours, theirs, 1)
    parts = "resnets|attentions|downsamplers|upsamplers"
    if found := re.match(rf"down_blocks\.(\d+)\.({parts})\.(\d+)\.(.*)", key):
        level, part, number, rest = int(found[1]), found[2], int(found[3]), found[4]
        block = 1 + level * (layers + 1) + (layers if part == "downsamplers" else number)
        inner = {"resnets": "0", "attentions": "1", "downsamplers": "0"}[part]
        rest = rest.replace("conv.", "op.", 1) if part == "downsamplers" else rest
        return f"input_blocks.{block}.{inner}.{_resnet(rest) if part == 'resnets' else rest}"
    if found := re.match(r"mid_block\.(resnets|attentions)\.(\d+)\.(.*)", key):
        inner = {"resnets0": 0, "attentions0": 1, "resnets1": 2}[found[1] + found[2]]
        return f"middle_block.{inner}.{_resnet(found[3]) if found[1] == 'resnets' else found[3]}"
    found = re.match(rf"up_blocks\.(\d+)\.({parts})\.(\d+)\.(.*)", key)
    level, part, number, rest = int(found[1]), found[2], int(found[3]), found[4]
    block = level * (layers + 1) + (layers if part == "upsamplers" else number)
    has_attention = level > 0  # the tiny UNet's lowest level has none
    inner = {"resnets": 0, "attentions": 1, "upsamplers": 2 if has_attention else 1}[part]
    return f"output_blocks.{block}.{inner}.{_resnet(rest) if part == 'resnets' else rest}"


def _resnet(rest: str) -> str:
    for ours, theirs in (
        ("norm1.", "in_layers.0."),
        ("conv1.", "in_layers.2."),
        ("norm2.", "out_layers.0."),
        ("conv2.", "out_layers.3."),
        ("time_emb_proj.", "emb_layers.1."),
        ("conv_shortcut.", "skip_connection."),
    ):
        if rest.startswith(ours):
            return rest.replace(ours, theirs, 1)
    return rest


def _vae(weights):
    """Name an AutoencoderKL's weights as Stable Diffusion's autoencoder does."""
    named = {_vae_key(key): value for key, value in weights.items()}
    for key, value in named.items():  # attention there is made of 1x1 convolutions
        if ".attn_1." in key and value.ndim == 2:
            named[key] = value[:, :, None, None]
    return named


def _vae_key(key: str) -> str:
    key = key.replace("conv_norm_out.", "norm_out.").replace("conv_shortcut.", "nin_shortcut.")
    key = re.sub(r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    for ours, theirs in (
        ("group_norm", "norm"),
        ("to_q", "q"),
        ("to_k", "k"),
        ("to_v", "v"),
        ("to_out.0", "proj_out"),
    ):
        key = key.replace(f"mid_block.attentions.0.{ours}.", f"mid.attn_1.{theirs}.")
    key = re.sub(r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block.", key)
    key = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample.", key)
    key = re.sub(r"up_blocks\.(\d+)\.resnets\.", lambda m: f"up.{3 - int(m[1])}.block.", key)
    return re.sub(
        r"up_blocks\.(\d+)\.upsamplers\.0\.", lambda m: f"up.{3 - int(m[1])}.upsample.", key
    )

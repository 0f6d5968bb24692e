"""Models in the classes of Stable Diffusion 1.5, in three sizes; random but for the embedded one.

Random weights take the same time as trained ones, and nothing has to be downloaded.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sdbatch.models.find_model import BUILTIN
from sdbatch.models.sd1 import LAYOUT

SCHEDULER = {  # of the published model
    "_class_name": "PNDMScheduler",
    "clip_sample": False,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "prediction_type": "epsilon",
}


@dataclass(frozen=True)
class Size:
    """The sizes of a model's parts."""

    pixels: int  # of a side of its images
    unet: dict[str, Any]
    vae: dict[str, Any]
    text: dict[str, Any]


EMBEDDED = "embedded"  # builtin:shapes
SIZES = {
    # the tests' model
    "tiny": Size(
        64,
        {
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": 32,
            "attention_head_dim": 4,
            "norm_num_groups": 8,
        },
        {"block_out_channels": (8, 16, 16, 32), "layers_per_block": 1, "norm_num_groups": 4},
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "heads": 4},
    ),
    # Stable Diffusion 1.5: 860 M parameters in the UNet
    "sd15": Size(
        512,
        {"cross_attention_dim": 768, "attention_head_dim": 8},
        {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2},
        {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "heads": 12},
    ),
}


NAMES = (*SIZES, EMBEDDED)


def pixels(name: str) -> int:
    """Return the pixels of a side of the images of the model `name`."""
    return 128 if name == EMBEDDED else SIZES[name].pixels


def _unet(size: Size, channels: int = 4) -> UNet2DConditionModel:
    # sample_size, in latents, is the default of diffusers' pipelines
    return UNet2DConditionModel(in_channels=channels, sample_size=64, **size.unet)


def _vae(size: Size) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        **size.vae,
    )


@cache
def operations(name: str) -> tuple[dict[str, float], dict[str, float]]:
    """Return the TFLOP of each operator: of the UNet for a row, of the VAE for a decoded image."""
    size = SIZES[name]
    side, width = size.pixels // 8, size.unet["cross_attention_dim"]
    with torch.device("meta"), torch.inference_mode():
        unet, vae = _unet(size), _vae(size)
        with FlopCounterMode(display=False) as unet_count:
            unet(torch.empty(1, 4, side, side), 1, encoder_hidden_states=torch.empty(1, 77, width))
        with FlopCounterMode(display=False) as vae_count:
            vae.decode(torch.empty(1, 4, side, side))
    return _by_operator(unet_count), _by_operator(vae_count)


def _by_operator(count: FlopCounterMode) -> dict[str, float]:
    return {str(name): flop / 1e12 for name, flop in count.get_flop_counts()["Global"].items()}


def flop(name: str) -> tuple[float, float]:
    """Return the TFLOP of the UNet for a row, and of the VAE's decoder for an image."""
    unet, vae = operations(name)
    return sum(unet.values()), sum(vae.values())


def parts(
    name: str, device: str = "cpu", dtype: torch.dtype = torch.float32, channels: int = 4
) -> dict[str, Any]:
    """Return the parts of the model `name`, one of NAMES, as sd1.loading.assemble takes them.

    Random weights are drawn in float32 on `device` and then rounded: the same on every call. The
    UNet of a random model has `channels`: 9 for inpainting, 8 for editing by instruction.
    """
    if name == EMBEDDED:
        pipe = StableDiffusionPipeline.from_pretrained(BUILTIN / "shapes", torch_dtype=dtype)
        trained = {part: getattr(pipe, part) for part in ("tokenizer", *LAYOUT.weights)}
        return {**trained, "scheduler_config": SCHEDULER}
    size = SIZES[name]
    tokenizer = CLIPTokenizer.from_pretrained(BUILTIN / "shapes" / "tokenizer")
    text = dict(size.text)
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        random: dict[str, torch.nn.Module] = {
            "text_encoder": CLIPTextModel(
                CLIPTextConfig(
                    vocab_size=len(tokenizer),
                    num_attention_heads=text.pop("heads"),
                    projection_dim=text["hidden_size"],
                    bos_token_id=tokenizer.bos_token_id,
                    eos_token_id=tokenizer.eos_token_id,
                    pad_token_id=tokenizer.pad_token_id,
                    **text,
                )
            ),
            "unet": _unet(size, channels),
            "vae": _vae(size),
        }
    for part in random.values():
        torch.nn.Module.to(part, dtype=dtype)  # diffusers' own `to` warns
    return {"tokenizer": tokenizer, "scheduler_config": SCHEDULER, **random}

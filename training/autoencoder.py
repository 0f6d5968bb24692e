"""The autoencoder: pictures of 128x128 to latents of 4x16x16 and back.

# B = pictures, pixels (B, 3, H, W) from -1 to 1, latents (B, 4, H / 8, W / 8).
"""

import random
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from training import scenes
from training.loop import Settings, let_through, train

SETTINGS = Settings(
    steps=14_000,
    batch=8,
    rate=1e-3,
    course=((0, 0.0), (200, 1.0), (10_000, 1.0), (14_000, 0.0)),
    muon=True,
    threads=2,
)
LOG_VARIANCE = -6.0  # of the latents at the start: more noise than that hides them
KL_WEIGHT = 1e-4  # so weak that it only keeps the latents smooth
TILES = 15 / 16  # of the steps show tiles full of shapes; the last ones whole scenes, often empty
CHANNELS = (16, 32, 48, 64)


def build() -> AutoencoderKL:
    """Return Stable Diffusion's autoencoder in small: f = 8, 4 latent channels."""
    network = AutoencoderKL(
        block_out_channels=CHANNELS,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=8,
        layers_per_block=1,
        sample_size=128,
    )
    let_through(network)
    torch.nn.init.constant_(network.quant_conv.bias[4:], LOG_VARIANCE)
    return network


def fit(folder: Path, settings: Settings) -> AutoencoderKL:
    """Train the autoencoder; return it with its latents scaled to unit variance."""
    torch.manual_seed(settings.seed)
    network = build().to(memory_format=torch.channels_last)

    def loss(step: int) -> torch.Tensor:
        noise = torch.Generator().manual_seed(step)
        pixels = _shown(step, settings, noise)
        posterior = network.encode(pixels).latent_dist
        drawn = network.decode(posterior.sample(noise)).sample
        spread: torch.Tensor = posterior.kl().mean() / posterior.mean[0].numel()
        return difference(drawn, pixels) + KL_WEIGHT * spread

    train(network, loss, settings, folder)
    with torch.inference_mode():
        chance = random.Random(f"scale-{settings.seed}")
        pixels = scenes.render([scenes.imagine(chance) for _ in range(256)], "scale")
        spread = network.encode(pixels).latent_dist.mean.std().item()
    network.register_to_config(scaling_factor=round(1 / spread, 5))
    return network


def _shown(step: int, settings: Settings, random_numbers: torch.Generator) -> torch.Tensor:
    """Return the pictures of a step; (batch, 3, 64, 64) or (batch, 3, 128, 128)."""
    seed = f"autoencoder-{settings.seed}-{step}"
    if step < TILES * settings.steps:
        return scenes.tiles(scenes.crowds(seed, settings.batch // 4), random_numbers)
    chance = random.Random(seed)
    return scenes.render([scenes.imagine(chance) for _ in range(settings.batch)], seed)


def difference(drawn: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """Return the mean absolute and squared error, with that of the edges (first differences)."""
    error = drawn - pixels
    edges: torch.Tensor = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return error.abs().mean() + error.square().mean() + edges

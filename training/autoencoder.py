"""The autoencoder, which encodes pictures of 128x128 as latents of 4x16x16 and decodes them.

Shapes: B pictures, pixels (B, 3, H, W) from -1 to 1, latents (B, 4, H / 8, W / 8).
"""

import random
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from training import scenes
from training.loop import Settings, initialize_weights, train

SETTINGS = Settings(
    steps=14_000,
    batch=8,
    rate=1e-3,
    rate_schedule=((0, 0.0), (200, 1.0), (10_000, 1.0), (14_000, 0.0)),
    muon=True,
    threads=2,
)
LOG_VARIANCE = -6.0  # of the latents at the start: with more noise the signal would be lost
KL_WEIGHT = 1e-4  # just enough to keep the latents smooth
# Share of the steps that train on tiles of crowded pictures; the remaining steps train on whole
# scenes, which are mostly background.
TILE_STEPS = 15 / 16
CHANNELS = (16, 32, 48, 64)


def build_autoencoder() -> AutoencoderKL:
    """Return a small version of Stable Diffusion's autoencoder: f = 8, 4 latent channels."""
    network = AutoencoderKL(
        block_out_channels=CHANNELS,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=8,
        layers_per_block=1,
        sample_size=128,
    )
    initialize_weights(network)
    torch.nn.init.constant_(network.quant_conv.bias[4:], LOG_VARIANCE)
    return network


def train_autoencoder(folder: Path, settings: Settings) -> AutoencoderKL:
    """Train and return the autoencoder, with a scaling factor for latents of unit variance."""
    torch.manual_seed(settings.seed)
    network = build_autoencoder().to(memory_format=torch.channels_last)

    def loss(step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(step)
        pixels = _training_pictures(step, settings, generator)
        posterior = network.encode(pixels).latent_dist
        reconstruction = network.decode(posterior.sample(generator)).sample
        kl: torch.Tensor = posterior.kl().mean() / posterior.mean[0].numel()
        return reconstruction_loss(reconstruction, pixels) + KL_WEIGHT * kl

    train(network, loss, settings, folder)
    with torch.inference_mode():
        rng = random.Random(f"scale-{settings.seed}")
        pixels = scenes.render_scenes([scenes.random_scene(rng) for _ in range(256)], "scale")
        deviation = network.encode(pixels).latent_dist.mean.std().item()
    network.register_to_config(scaling_factor=round(1 / deviation, 5))
    return network


def _training_pictures(step: int, settings: Settings, generator: torch.Generator) -> torch.Tensor:
    """Return the pictures of a step; (batch, 3, 64, 64) or (batch, 3, 128, 128)."""
    seed = f"autoencoder-{settings.seed}-{step}"
    if step < TILE_STEPS * settings.steps:
        return scenes.cut_tiles(scenes.render_crowds(seed, settings.batch // 4), generator)
    rng = random.Random(seed)
    return scenes.render_scenes([scenes.random_scene(rng) for _ in range(settings.batch)], seed)


def reconstruction_loss(reconstruction: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """Return the mean absolute error plus the mean squared error plus the error of the edges.

    The error of the edges is the mean absolute error of the first differences.
    """
    error = reconstruction - pixels
    edges: torch.Tensor = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return error.abs().mean() + error.square().mean() + edges

"""The UNet, trained on the autoencoder's latents and the text encoder's output.

Shapes: B pictures, latents (B, 4, 16, 16) of unit variance.
"""

import hashlib
import itertools
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from sdbatch.shapes.captions import write_caption
from sdbatch.shapes.world import Scene
from training import scenes, text_encoder
from training.loop import Settings, initialize_weights, train

SETTINGS = Settings(
    steps=27_000,
    batch=32,
    rate=3e-3,
    rate_schedule=(
        *((0, 0.0), (100, 1.0), (2_500, 1.0)),
        *((3_000, 0.4), (11_500, 1 / 11), (11_600, 0.18), (21_000, 0.0)),
        *((21_250, 0.1), (27_000, 0.0)),
    ),
    muon=True,
    threads=2,
)
SCENE_COUNT = 40_000
# From this step on, a scene is chosen in proportion to its number of shapes. The shapes that the
# network draws worst at that point have a higher weight.
WEIGHTED_SCENES_FROM = 8_750
SHAPE_WEIGHTS = {"star": 3.0, "cross": 1.5, "ring": 1.5, "moon": 1.5}
# From this step on, about two thirds of the timesteps come from the range that determines the
# content of the picture. Each point is (share of the sampled timesteps, fraction of the schedule
# that they lie below).
WEIGHTED_TIMESTEPS_FROM = 10_500
TIMESTEP_DISTRIBUTION = ((0.0, 0.0), (0.1, 0.25), (0.25, 0.45), (0.9, 0.85), (1.0, 1.0))
# From this step on, the text encoder knows which colour belongs to which shape: see
# text_encoder.READING_ORDER_FROM.
READING_ORDER_FROM = 21_000
EMPTY_CAPTION_RATE = 0.1  # as in Stable Diffusion 1.5's training, for guidance
# Standard deviation of noise that is constant over a channel. Without it, the mean of 256 cells
# remains visible under all other noise: the network reads the background's colour there instead
# of learning it from the caption.
OFFSET_NOISE = 0.2
TIMESTEP_COUNT = 1000
NOISE_SCHEDULE = {  # Stable Diffusion 1.5's
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": TIMESTEP_COUNT,
}


@dataclass(frozen=True, slots=True)
class Latents:
    """The scenes that the UNet trains on, and their latents."""

    scenes: list[Scene]
    values: torch.Tensor  # (N, 4, 16, 16), unit variance


def encode_scenes(autoencoder: AutoencoderKL, seed: int, count: int, folder: Path) -> Latents:
    """Render and encode `count` random scenes, or read their latents from the cache in `folder`."""
    rng = random.Random(f"latents-{seed}")
    training_scenes = [scenes.random_scene(rng) for _ in range(count)]
    cache_file = folder / f"latents-{_digest(autoencoder, training_scenes)}.pt"
    if not cache_file.exists():
        batches = []
        with torch.inference_mode():
            for start in range(0, count, 50):
                batch = training_scenes[start : start + 50]
                pixels = scenes.render_scenes(batch, f"latents-{seed}-{start}")
                batches.append(autoencoder.encode(pixels).latent_dist.mean)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(torch.cat(batches) * autoencoder.config.scaling_factor, folder / "latents.tmp")
        (folder / "latents.tmp").rename(cache_file)
    return Latents(training_scenes, torch.load(cache_file))


def _digest(network: torch.nn.Module, scenes: list[Scene]) -> str:
    digest = hashlib.sha256(repr(scenes).encode())
    for weights in network.state_dict().values():
        digest.update(weights.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def train_unet(
    latents: Latents,
    tokenizer: CLIPTokenizer,
    encoder: CLIPTextModel,
    folder: Path,
    settings: Settings,
) -> UNet2DConditionModel:
    """Train and return the UNet, which predicts the noise in latents.

    The loss is weighted so that it is about the same at all timesteps. Otherwise the timesteps
    with much noise would hardly count.

    Source: Ho et al. 2020, eq. 14; Ho and Salimans 2022 for empty captions; Guttenberg 2023 for
    offset noise.
    """
    torch.manual_seed(settings.seed)
    network = build_unet().to(memory_format=torch.channels_last)
    scheduler = DDPMScheduler(**NOISE_SCHEDULE)
    cumulative_weights = list(itertools.accumulate(_weight(scene) for scene in latents.scenes))

    def loss(step: int) -> torch.Tensor:
        rng = random.Random(f"denoiser-{settings.seed}-{step}")
        generator = torch.Generator().manual_seed(rng.getrandbits(60))
        indices = choose_scenes(step, settings.batch, cumulative_weights, rng)
        batch = [latents.scenes[index] for index in indices]
        captions = write_captions(batch, rng, reading_order=step >= READING_ORDER_FROM)
        with torch.no_grad():
            text = encoder(text_encoder.tokenize(tokenizer, captions)).last_hidden_state
        clean = latents.values[indices]
        noise = torch.randn(clean.shape, generator=generator)
        noise += OFFSET_NOISE * torch.randn((*clean.shape[:2], 1, 1), generator=generator)
        timesteps = sample_timesteps(step, settings.batch, generator)
        noisy = scheduler.add_noise(clean, noise, timesteps)
        noisy = noisy.contiguous(memory_format=torch.channels_last)
        prediction = network(noisy, timesteps, text).sample
        error = (prediction - noise).square().mean((1, 2, 3))
        losses: torch.Tensor = error / scheduler.alphas_cumprod[timesteps].sqrt()
        return losses.mean()

    train(network, loss, settings, folder)
    return network


def choose_scenes(
    step: int, count: int, cumulative_weights: list[float], rng: random.Random
) -> list[int]:
    """Choose the scenes of a step; return their indices.

    Args:
        step: from WEIGHTED_SCENES_FROM on, scenes with a higher weight are more likely.
        count: how many scenes to choose.
        cumulative_weights: for each scene, the sum of its weight and of all weights before it.
        rng: makes the choice.
    """
    indices = range(len(cumulative_weights))
    if step < WEIGHTED_SCENES_FROM:
        return [rng.randrange(len(indices)) for _ in range(count)]
    return rng.choices(indices, cum_weights=cumulative_weights, k=count)


def sample_timesteps(step: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """Sample `count` timesteps, one from each of `count` equal parts of their distribution.

    The loss varies less than with independent samples.
    """
    quantiles = (torch.arange(count) + torch.rand(count, generator=generator)).numpy() / count
    if step >= WEIGHTED_TIMESTEPS_FROM:
        shares, limits = zip(*TIMESTEP_DISTRIBUTION, strict=True)
        quantiles = np.interp(quantiles, shares, limits)
    timesteps = torch.from_numpy(quantiles * TIMESTEP_COUNT).long()
    return timesteps.clamp(max=TIMESTEP_COUNT - 1)


def _weight(scene: Scene) -> float:
    return sum((group.count or 1) * SHAPE_WEIGHTS.get(group.shape, 1.0) for group in scene.groups)


def write_captions(scenes: list[Scene], rng: random.Random, *, reading_order: bool) -> list[str]:
    """Write a new caption for each scene; some are empty, as guidance requires."""
    return [
        ""
        if rng.random() < EMPTY_CAPTION_RATE
        else write_caption(scene, rng, reading_order=reading_order)
        for scene in scenes
    ]


def build_unet() -> UNet2DConditionModel:
    """Return a small version of Stable Diffusion's UNet."""
    network = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(64, 96, 112),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=text_encoder.WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    initialize_weights(network)
    torch.nn.init.zeros_(network.conv_out.weight)
    return network

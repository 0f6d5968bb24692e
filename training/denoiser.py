"""The UNet, trained on the autoencoder's latents and the text encoder's captions.

# B = pictures, latents (B, 4, 16, 16) of unit variance.
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

from sdbatch.shapes import captions
from sdbatch.shapes.world import Scene
from training import scenes, text_encoder
from training.loop import Settings, let_through, train

SETTINGS = Settings(
    steps=27_000,
    batch=32,
    rate=3e-3,
    course=(
        *((0, 0.0), (100, 1.0), (2_500, 1.0)),
        *((3_000, 0.4), (11_500, 1 / 11), (11_600, 0.18), (21_000, 0.0)),
        *((21_250, 0.1), (27_000, 0.0)),
    ),
    muon=True,
    threads=2,
)
SCENES = 40_000
# From this step on a scene is shown as often as it has things to draw, those of these shapes
# counting for more: what the network was still getting wrong.
HARD_FROM = 8_750
HARD = {"star": 3.0, "cross": 1.5, "ring": 1.5, "moon": 1.5}
# From this step on two times of three are those at which it is decided what the picture shows: part
# of the drawn times, part of the schedule that they lie below.
DECIDING_FROM = 10_500
DECIDING = ((0.0, 0.0), (0.1, 0.25), (0.25, 0.45), (0.9, 0.85), (1.0, 1.0))
# From this step on it has the text encoder that hears whose colour is whose; see there.
IN_ORDER_FROM = 21_000
EMPTY = 0.1  # of the captions, as Stable Diffusion 1.5 was trained for guidance
# Of noise that is the same all over a channel. Without it the mean of 256 cells shows through all
# other noise: the network reads the background's colour there and does not learn it from words.
OFFSET = 0.2
TIMES = 1000
NOISE = {  # Stable Diffusion 1.5's
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": TIMES,
}


@dataclass(frozen=True, slots=True)
class Latents:
    """The scenes that the denoiser learns from, as the autoencoder sees them."""

    scenes: list[Scene]
    values: torch.Tensor  # (N, 4, 16, 16), unit variance


def encode(autoencoder: AutoencoderKL, seed: int, count: int, folder: Path) -> Latents:
    """Render and encode `count` scenes, or read them from `folder` if it has these."""
    chance = random.Random(f"latents-{seed}")
    imagined = [scenes.imagine(chance) for _ in range(count)]
    kept = folder / f"latents-{_digest(autoencoder, imagined)}.pt"
    if not kept.exists():
        parts = []
        with torch.inference_mode():
            for at in range(0, count, 50):
                pixels = scenes.render(imagined[at : at + 50], f"latents-{seed}-{at}")
                parts.append(autoencoder.encode(pixels).latent_dist.mean)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(torch.cat(parts) * autoencoder.config.scaling_factor, folder / "latents.tmp")
        (folder / "latents.tmp").rename(kept)
    return Latents(imagined, torch.load(kept))


def _digest(network: torch.nn.Module, scenes: list[Scene]) -> str:
    digest = hashlib.sha256(repr(scenes).encode())
    for weights in network.state_dict().values():
        digest.update(weights.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def fit(
    latents: Latents,
    tokenizer: CLIPTokenizer,
    encoder: CLIPTextModel,
    folder: Path,
    settings: Settings,
) -> UNet2DConditionModel:
    """Train the UNet to find the noise in latents; return it.

    Source: Ho et al. 2020, eq. 14, weighted so that the loss of all times is about alike, or
    those of much noise count for nothing; Ho and Salimans 2022's empty captions; Guttenberg
    2023's offset noise.
    """
    torch.manual_seed(settings.seed)
    network = build().to(memory_format=torch.channels_last)
    scheduler = DDPMScheduler(**NOISE)
    to_draw = list(itertools.accumulate(_to_draw(scene) for scene in latents.scenes))

    def loss(step: int) -> torch.Tensor:
        chance = random.Random(f"denoiser-{settings.seed}-{step}")
        random_numbers = torch.Generator().manual_seed(chance.getrandbits(60))
        chosen = choose(step, settings.batch, to_draw, chance)
        shown = [latents.scenes[number] for number in chosen]
        prompts = say_all(shown, chance, in_order=step >= IN_ORDER_FROM)
        with torch.no_grad():
            text = encoder(text_encoder.tokens(tokenizer, prompts)).last_hidden_state
        clean = latents.values[chosen]
        noise = torch.randn(clean.shape, generator=random_numbers)
        noise += OFFSET * torch.randn((*clean.shape[:2], 1, 1), generator=random_numbers)
        times = draw_times(step, settings.batch, random_numbers)
        noisy = scheduler.add_noise(clean, noise, times)
        found = network(noisy.contiguous(memory_format=torch.channels_last), times, text).sample
        error = (found - noise).square().mean((1, 2, 3))
        weighted: torch.Tensor = error / scheduler.alphas_cumprod[times].sqrt()
        return weighted.mean()

    train(network, loss, settings, folder)
    return network


def choose(step: int, count: int, to_draw: list[float], chance: random.Random) -> list[int]:
    """Choose `count` scenes to show in a step, by number.

    Args:
        step: from HARD_FROM on, scenes with much to draw are chosen more often.
        count: how many.
        to_draw: of each scene, how much there is to draw in it and all before it.
        chance: decides.
    """
    every = range(len(to_draw))
    if step < HARD_FROM:
        return [chance.randrange(len(every)) for _ in range(count)]
    return chance.choices(every, cum_weights=to_draw, k=count)


def draw_times(step: int, count: int, random_numbers: torch.Generator) -> torch.Tensor:
    """Draw `count` times of the noise's schedule, one of each part: the loss varies less."""
    parts = (torch.arange(count) + torch.rand(count, generator=random_numbers)).numpy() / count
    if step >= DECIDING_FROM:
        drawn, below = zip(*DECIDING, strict=True)
        parts = np.interp(parts, drawn, below)
    return torch.from_numpy(parts * TIMES).long().clamp(max=TIMES - 1)


def _to_draw(scene: Scene) -> float:
    return sum((group.count or 1) * HARD.get(group.shape, 1.0) for group in scene.groups)


def say_all(scenes: list[Scene], chance: random.Random, *, in_order: bool) -> list[str]:
    """Say each scene anew, and some not at all: what guidance needs to know of."""
    return [
        "" if chance.random() < EMPTY else captions.say(scene, chance, in_order=in_order)
        for scene in scenes
    ]


def build() -> UNet2DConditionModel:
    """Return Stable Diffusion's UNet in small."""
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
    let_through(network)
    torch.nn.init.zeros_(network.conv_out.weight)
    return network

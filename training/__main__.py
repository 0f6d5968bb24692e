"""`python -m training FOLDER`: make the embedded model, its three networks one after the other.

Stopped and started again it goes on where it was. `--miniature` does the same with so few and
small steps that it ends after about two minutes, to show that all of it works.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import PNDMScheduler, StableDiffusionPipeline

from training import autoencoder, denoiser, text_encoder, tokens

MODEL = "model"  # folders
NETWORKS = TEXT_ENCODER, AUTOENCODER, DENOISER = "text_encoder", "autoencoder", "denoiser"


def make(folder: Path, *, miniature: bool = False) -> Path:
    """Train the model in `folder`; return the folder of the finished one, in diffusers' layout."""
    of_text, of_pictures, of_noise = (
        network.SETTINGS for network in (text_encoder, autoencoder, denoiser)
    )
    count, first = denoiser.SCENES, (text_encoder.IN_ORDER_FROM, denoiser.IN_ORDER_FROM)
    if miniature:
        first = (50, 50)
        of_text = replace(of_text, steps=100, course=((0, 0.0), (20, 1.0)))
        few = ((0, 0.0), (20, 1.0), (100, 0.0))
        of_pictures = replace(of_pictures, steps=100, course=few)
        of_noise = replace(of_noise, steps=100, batch=8, course=few)
        count = 200
    tokenizer = tokens.build()
    # Rounded as they are saved: the UNet learns from what it will work with.
    vae = autoencoder.fit(folder / AUTOENCODER, of_pictures).half().float()
    latents = denoiser.encode(vae, of_noise.seed, count, folder / DENOISER)
    for text_steps, noise_steps in (first, (of_text.steps, of_noise.steps)):
        settings = replace(of_text, steps=text_steps)
        encoder = text_encoder.fit(tokenizer, folder / TEXT_ENCODER, settings).half().float()
        settings = replace(of_noise, steps=noise_steps)
        unet = denoiser.fit(latents, tokenizer, encoder, folder / DENOISER, settings)
    model = StableDiffusionPipeline(
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokens.build(),  # one that was used is saved with its padding
        unet=unet,
        scheduler=PNDMScheduler(
            **denoiser.NOISE, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    model.to(torch.float16).save_pretrained(folder / MODEL)
    _load_in_float32(folder / MODEL / "text_encoder" / "config.json")
    return folder / MODEL


def _load_in_float32(config: Path) -> None:
    """Have a text encoder load in float32 unless asked otherwise, as diffusers' networks do.

    transformers loads in the type that the config names, and a pipeline of two types fails.
    """
    settings = json.loads(config.read_text())
    config.write_text(json.dumps({**settings, "dtype": "float32"}, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--miniature", action="store_true")
    given = parser.parse_args()
    print(make(given.folder, miniature=given.miniature))

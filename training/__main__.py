"""`python -m training FOLDER`: make the embedded model, both networks one after the other.

Stopped and started again it goes on where it was. `--miniature` does the same with so few steps
that it ends after two minutes, to show that all of it works.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import PNDMScheduler, StableDiffusionPipeline

from training import autoencoder, denoiser, tokens

MODEL, AUTOENCODER, DENOISER = "model", "autoencoder", "denoiser"  # folders
THREADS = 2  # the sums of another number of threads differ in their last bits


def make(folder: Path, *, miniature: bool = False) -> Path:
    """Train the model in `folder`; return the folder of the finished one, in diffusers' layout."""
    torch.set_num_threads(THREADS)
    settings = (autoencoder.SETTINGS, denoiser.SETTINGS)
    count = denoiser.SCENES
    if miniature:
        settings = (replace(settings[0], steps=150), replace(settings[1], steps=100, warmup=20))
        count = 500
    vae = autoencoder.fit(folder / AUTOENCODER, settings[0])
    tokenizer = tokens.build()
    latents = denoiser.encode(vae, settings[1].seed, count, folder / DENOISER)
    network = denoiser.fit(latents, tokenizer, folder / DENOISER, settings[1])
    model = StableDiffusionPipeline(
        vae=vae,
        text_encoder=network.text_encoder,
        tokenizer=tokenizer,
        unet=network.unet,
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

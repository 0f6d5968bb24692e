"""`python -m training FOLDER`: train the three networks of the embedded model and save the model.

A training that was interrupted resumes from its last saved state. `--miniature` runs all of it
with few and small steps in about two minutes, to check that it works.
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


def train_model(folder: Path, *, miniature: bool = False) -> Path:
    """Train the model in `folder`; return the folder of the result, in diffusers' layout."""
    text_settings, vae_settings, unet_settings = (
        network.SETTINGS for network in (text_encoder, autoencoder, denoiser)
    )
    scene_count = denoiser.SCENE_COUNT
    first_round = text_encoder.READING_ORDER_FROM, denoiser.READING_ORDER_FROM
    if miniature:
        first_round = 50, 50
        text_settings = replace(text_settings, steps=100, rate_schedule=((0, 0.0), (20, 1.0)))
        short_schedule = ((0, 0.0), (20, 1.0), (100, 0.0))
        vae_settings = replace(vae_settings, steps=100, rate_schedule=short_schedule)
        unet_settings = replace(unet_settings, steps=100, batch=8, rate_schedule=short_schedule)
        scene_count = 200
    tokenizer = tokens.build_tokenizer()
    # Rounded to float16 as in the saved model, so that the UNet learns from the final weights.
    vae = autoencoder.train_autoencoder(folder / AUTOENCODER, vae_settings).half().float()
    latents = denoiser.encode_scenes(vae, unet_settings.seed, scene_count, folder / DENOISER)
    second_round = text_settings.steps, unet_settings.steps
    for text_steps, unet_steps in (first_round, second_round):
        settings = replace(text_settings, steps=text_steps)
        encoder = text_encoder.train_text_encoder(tokenizer, folder / TEXT_ENCODER, settings)
        encoder = encoder.half().float()
        settings = replace(unet_settings, steps=unet_steps)
        unet = denoiser.train_unet(latents, tokenizer, encoder, folder / DENOISER, settings)
    model = StableDiffusionPipeline(
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokens.build_tokenizer(),  # a used tokenizer would save its padding, too
        unet=unet,
        scheduler=PNDMScheduler(
            **denoiser.NOISE_SCHEDULE,
            skip_prk_steps=True,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    model.to(torch.float16).save_pretrained(folder / MODEL)
    _set_default_dtype(folder / MODEL / "text_encoder" / "config.json")
    return folder / MODEL


def _set_default_dtype(config: Path) -> None:
    """Make float32 the default dtype of a saved text encoder, as it is for diffusers' networks.

    transformers loads a network in the dtype that its config names, and a pipeline with two
    dtypes fails.
    """
    settings = json.loads(config.read_text())
    config.write_text(json.dumps({**settings, "dtype": "float32"}, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--miniature", action="store_true")
    arguments = parser.parse_args()
    print(train_model(arguments.folder, miniature=arguments.miniature))

"""The training of each network depends only on its seed."""

import random
from dataclasses import replace

import pytest
import torch

from training import autoencoder, denoiser, text_encoder, tokens


@pytest.fixture(autouse=True)
def threads():
    """Use one thread of torch, and restore the number of threads afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def short_settings(network):
    return replace(network.SETTINGS, steps=3, batch=4, threads=1)


def train_text_encoder(folder):
    return text_encoder.train_text_encoder(
        tokens.build_tokenizer(), folder, short_settings(text_encoder)
    )


def train_autoencoder(folder):
    return autoencoder.train_autoencoder(folder, short_settings(autoencoder))


def train_unet(folder):
    torch.manual_seed(0)
    tokenizer = tokens.build_tokenizer()
    latents = denoiser.encode_scenes(autoencoder.build_autoencoder(), 0, 8, folder)
    encoder = text_encoder.build_text_encoder(tokenizer)
    return denoiser.train_unet(latents, tokenizer, encoder, folder, short_settings(denoiser))


@pytest.mark.parametrize(
    "train",
    [train_text_encoder, pytest.param(train_autoencoder, marks=pytest.mark.slow), train_unet],
)
def test_weights_depend_only_on_the_seed_and_not_on_earlier_random_numbers(train, tmp_path):
    first = train(tmp_path / "first").state_dict()
    torch.rand(7)
    random.random()
    second = train(tmp_path / "second").state_dict()
    assert all(torch.equal(weights, second[name]) for name, weights in first.items())

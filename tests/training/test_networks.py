"""Each network's training: a function of its seed; and what the UNet's captions are."""

import random
from dataclasses import replace

import pytest
import torch

from sdbatch.shapes import captions, world
from training import autoencoder, denoiser, text_encoder, tokens


@pytest.fixture(autouse=True)
def threads():
    """Use one of torch's threads all along, and leave their number as it was."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def few(network):
    return replace(network.SETTINGS, steps=3, threads=1)


def fit_text_encoder(folder):
    return text_encoder.fit(tokens.build(), folder, few(text_encoder))


def fit_autoencoder(folder):
    return autoencoder.fit(folder, few(autoencoder))


def fit_denoiser(folder):
    torch.manual_seed(0)
    tokenizer = tokens.build()
    latents = denoiser.encode(autoencoder.build(), 0, 8, folder)
    encoder = text_encoder.build(tokenizer)
    return denoiser.fit(latents, tokenizer, encoder, folder, few(denoiser))


@pytest.mark.parametrize("fit", [fit_text_encoder, fit_autoencoder, fit_denoiser])
def test_trainings_of_one_seed_give_the_same_weights_whatever_was_drawn_before(fit, tmp_path):
    one = fit(tmp_path / "one").state_dict()
    torch.rand(7)
    random.random()
    other = fit(tmp_path / "other").state_dict()
    assert all(torch.equal(weights, other[name]) for name, weights in one.items())


def test_a_tenth_of_the_captions_is_empty():
    chance = random.Random(0)
    scenes = [world.imagine(chance, world.is_for_training) for _ in range(3000)]
    said = denoiser.captions(scenes, chance, in_order=True)
    assert 0.08 < said.count("") / len(said) < 0.12
    assert len({captions.say(scenes[0], chance) for _ in range(50)}) > 10  # each is said anew


def test_what_has_more_to_draw_is_shown_more_often_later():
    to_draw = [1.0, 2.0, 12.0]  # so far: 1, 1 and 10
    early, late = (
        denoiser.choose(step, 3000, to_draw, random.Random(0))
        for step in (denoiser.HARD_FROM - 1, denoiser.HARD_FROM)
    )
    assert early.count(2) == pytest.approx(1000, rel=0.1)
    assert late.count(2) == pytest.approx(2500, rel=0.1)
    assert late.count(0) == pytest.approx(250, rel=0.3)


def test_most_times_are_those_that_decide_later():
    early, late = (
        denoiser.draw_times(step, 3200, torch.Generator())
        for step in (denoiser.DECIDING_FROM - 1, denoiser.DECIDING_FROM)
    )
    for times, part in ((early, 0.4), (late, 0.65)):
        assert ((times >= 450) & (times < 850)).float().mean() == pytest.approx(part, abs=0.02)
        assert times.min() < 40
        assert times.max() > 960


def test_latents_are_those_of_the_autoencoder_and_the_scenes(tmp_path):
    torch.manual_seed(0)
    vae = autoencoder.build()
    first = denoiser.encode(vae, 0, 4, tmp_path)
    assert torch.equal(denoiser.encode(vae, 0, 4, tmp_path).values, first.values)
    assert not torch.equal(denoiser.encode(vae, 1, 4, tmp_path).values, first.values)
    assert not torch.equal(
        denoiser.encode(autoencoder.build(), 0, 4, tmp_path).values, first.values
    )
    assert len(list(tmp_path.iterdir())) == 3

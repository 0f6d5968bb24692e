"""The inputs of the UNet in its training: captions, scenes, timesteps, latents."""

import random

import pytest
import torch

from sdbatch.shapes import world
from training import autoencoder, denoiser


def test_captions_are_new_each_time_and_a_tenth_is_empty():
    rng = random.Random(0)
    scenes = [world.random_scene(rng, world.is_for_training) for _ in range(3000)]
    captions = denoiser.write_captions(scenes, rng, reading_order=True)
    assert 0.08 < captions.count("") / len(captions) < 0.12
    variants = denoiser.write_captions([scenes[0]] * 50, rng, reading_order=True)
    assert len(set(variants)) > 10


def test_scenes_with_a_higher_weight_are_chosen_more_often_in_later_steps():
    cumulative_weights = [1.0, 2.0, 12.0]  # the weights are 1, 1 and 10
    early, late = (
        denoiser.choose_scenes(step, 3000, cumulative_weights, random.Random(0))
        for step in (denoiser.WEIGHTED_SCENES_FROM - 1, denoiser.WEIGHTED_SCENES_FROM)
    )
    assert early.count(2) == pytest.approx(1000, rel=0.1)
    assert late.count(2) == pytest.approx(2500, rel=0.1)
    assert late.count(0) == pytest.approx(250, rel=0.3)


def test_most_timesteps_of_later_steps_determine_the_content():
    early, late = (
        denoiser.sample_timesteps(step, 3200, torch.Generator())
        for step in (denoiser.WEIGHTED_TIMESTEPS_FROM - 1, denoiser.WEIGHTED_TIMESTEPS_FROM)
    )
    for timesteps, share in ((early, 0.4), (late, 0.65)):
        in_range = (timesteps >= 450) & (timesteps < 850)
        assert in_range.float().mean() == pytest.approx(share, abs=0.02)
        assert timesteps.min() < 40
        assert timesteps.max() > 960


def test_latents_depend_on_the_autoencoder_and_the_scenes(tmp_path):
    torch.manual_seed(0)
    vae = autoencoder.build_autoencoder()
    first = denoiser.encode_scenes(vae, 0, 4, tmp_path)
    assert torch.equal(denoiser.encode_scenes(vae, 0, 4, tmp_path).values, first.values)
    assert not torch.equal(denoiser.encode_scenes(vae, 1, 4, tmp_path).values, first.values)
    assert not torch.equal(
        denoiser.encode_scenes(autoencoder.build_autoencoder(), 0, 4, tmp_path).values, first.values
    )
    assert len(list(tmp_path.iterdir())) == 3

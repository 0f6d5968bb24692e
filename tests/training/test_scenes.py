"""The pictures that the networks train on: no held-out pairs, and tiles of them."""

import random

import torch

from sdbatch.shapes import world
from training import scenes


def test_crowded_pictures_have_no_held_out_pair():
    rng = random.Random(0)
    for _ in range(200):
        group = scenes._random_group(rng, "red", "large")
        assert not world.is_held_out(group)
        assert group.colour != "red"
    pictures = scenes.render_crowds("seed", 4)
    assert pictures.shape == (4, 3, 128, 128)
    assert pictures.min() >= -1
    assert pictures.max() <= 1
    assert torch.equal(pictures, scenes.render_crowds("seed", 4))
    assert not torch.equal(pictures, scenes.render_crowds("other", 4))


def test_tiles_have_the_pixels_of_their_pictures():
    pictures = scenes.render_crowds("seed", 3)
    tiles = scenes.cut_tiles(pictures, torch.Generator().manual_seed(0))
    assert tiles.shape == (12, 3, 64, 64)
    assert torch.equal(tiles.flatten().sort().values, pictures.flatten().sort().values)

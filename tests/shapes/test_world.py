"""Random scenes: they depend only on the seed, use every word, and hold some pairs out."""

import random
from itertools import product

import pytest

from sdbatch.shapes import world
from sdbatch.shapes.world import COLOURS, SHAPES, Group


def random_scenes(seed=0, count=3000, accept=lambda scene: True):
    rng = random.Random(seed)
    return [world.random_scene(rng, accept) for _ in range(count)]


def test_scenes_depend_only_on_the_seed():
    assert random_scenes(1, 50) == random_scenes(1, 50)
    assert random_scenes(1, 50) != random_scenes(2, 50)


def test_random_scenes_use_every_value():
    scenes = random_scenes()
    groups = [group for scene in scenes for group in scene.groups]
    assert {group.shape for group in groups} == set(SHAPES)
    assert {group.colour for group in groups} == set(COLOURS)
    assert {group.size for group in groups} == set(world.RADII)
    assert {group.texture for group in groups} == set(world.TEXTURES)
    assert {group.count for group in groups} == set(range(1, world.MAX_COUNT + 1))
    assert {scene.background for scene in scenes} == set(COLOURS)
    assert {scene.background_texture for scene in scenes} == set(world.BACKGROUND_TEXTURES)
    assert {scene.place for scene in scenes} == {None, *world.PLACES}
    assert {scene.relation for scene in scenes} == {None, *world.RELATIONS}


def test_groups_differ_from_the_background_and_from_each_other():
    for scene in random_scenes():
        assert all(group.colour != scene.background for group in scene.groups)
        pairs = [(group.shape, group.colour) for group in scene.groups]
        assert len(set(pairs)) == len(pairs)


def test_a_seventh_of_all_pairs_is_held_out_but_no_colour_and_no_shape_entirely():
    pairs = set(product(COLOURS, SHAPES))
    held_out = {(c, s) for c, s in pairs if world.is_held_out(Group(colour=c, shape=s))}
    assert 0.1 < len(held_out) / len(pairs) < 0.2
    training_pairs = pairs - held_out
    assert {colour for colour, _ in training_pairs} == set(COLOURS)
    assert {shape for _, shape in training_pairs} == set(SHAPES)


@pytest.mark.parametrize("seed", [1, 2])
def test_training_scenes_have_no_held_out_pair_and_test_scenes_start_with_one(seed):
    for scene in random_scenes(seed, 300, world.is_for_training):
        assert not any(world.is_held_out(group) for group in scene.groups)
    for scene in random_scenes(seed, 300, world.is_for_testing):
        assert world.is_held_out(scene.groups[0])

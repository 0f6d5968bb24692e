"""Scenes: imagined from a seed, possible to lay out, with pairs that training never shows."""

import random
from itertools import product

import pytest

from sdbatch.shapes import world
from sdbatch.shapes.world import COLOURS, SHAPES, Group

MANY = 3000


def imagined(seed=0, count=MANY, wanted=lambda scene: True):
    chance = random.Random(seed)
    return [world.imagine(chance, wanted) for _ in range(count)]


def test_scenes_are_a_function_of_the_seed():
    assert imagined(1, 50) == imagined(1, 50)
    assert imagined(1, 50) != imagined(2, 50)


def test_every_word_of_the_world_occurs():
    scenes = imagined()
    groups = [group for scene in scenes for group in scene.groups]
    assert {group.shape for group in groups} == set(SHAPES)
    assert {group.colour for group in groups} == set(COLOURS)
    assert {group.size for group in groups} == set(world.RADII)
    assert {group.texture for group in groups} == set(world.TEXTURES)
    assert {group.count for group in groups} == set(range(1, world.MOST + 1))
    assert {scene.background for scene in scenes} == set(COLOURS)
    assert {scene.background_texture for scene in scenes} == set(world.BACKGROUND_TEXTURES)
    assert {scene.place for scene in scenes} == {None, *world.PLACES}
    assert {scene.relation for scene in scenes} == {None, *world.RELATIONS}


def test_nothing_has_the_colour_of_its_background_and_two_groups_can_be_told_apart():
    for scene in imagined():
        assert all(group.colour != scene.background for group in scene.groups)
        looks = [(group.shape, group.colour) for group in scene.groups]
        assert len(set(looks)) == len(looks)


def test_a_seventh_of_all_pairs_is_held_out_but_no_colour_and_no_shape_as_a_whole():
    pairs = set(product(COLOURS, SHAPES))
    held = {(c, s) for c, s in pairs if world.is_held_out(Group(colour=c, shape=s))}
    assert 0.1 < len(held) / len(pairs) < 0.2
    seen = pairs - held
    assert {colour for colour, _ in seen} == set(COLOURS)
    assert {shape for _, shape in seen} == set(SHAPES)


@pytest.mark.parametrize("seed", [1, 2])
def test_training_shows_no_held_out_pair_and_testing_begins_with_one(seed):
    for scene in imagined(seed, 300, world.is_for_training):
        assert not any(world.is_held_out(group) for group in scene.groups)
    for scene in imagined(seed, 300, world.is_for_testing):
        assert world.is_held_out(scene.groups[0])

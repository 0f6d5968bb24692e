"""Scenes in words and back: whatever is said is read as it was meant."""

import random

import pytest

from sdbatch.shapes import captions, vocabulary, world
from sdbatch.shapes.parse import asked
from sdbatch.shapes.world import Group, Scene


def test_every_way_of_saying_a_scene_is_read_back_as_that_scene():
    chance = random.Random(5)
    for _ in range(5000):
        scene = world.imagine(chance)
        prompt = captions.say(scene, chance)
        read = asked(prompt)
        assert read is not None, prompt
        assert len(read.groups) == len(scene.groups), prompt
        for said, meant in zip(read.groups, scene.groups, strict=True):
            assert (said.shape, said.colour, said.count) == (meant.shape, meant.colour, meant.count)
            assert said.size in (None, meant.size), prompt
            assert said.texture in (None, meant.texture), prompt
        for name in ("background", "background_texture", "place", "relation"):
            assert getattr(read, name) in (None, getattr(scene, name)), (name, prompt)


def test_things_that_a_mere_and_joins_can_be_said_in_the_order_in_which_they_are_read():
    chance = random.Random(8)
    groups = (
        Group(shape=shape, colour="red", count=1, size="large", texture="plain")
        for shape in ("ring", "square")
    )
    scene = Scene(
        groups=tuple(groups), background="blue", background_texture="plain", relation="below"
    )
    for in_order, shapes in ((True, ["square", "ring"]), (False, ["ring", "square"])):
        read = [asked(captions.say(scene, chance, in_order=in_order)) for _ in range(200)]
        joined = [scene for scene in read if scene.relation is None]
        assert len(joined) > 10
        assert all([group.shape for group in scene.groups] == shapes for scene in joined)


def test_prompts_vary_and_use_every_name():
    chance = random.Random(6)
    scene = world.imagine(chance)
    assert len({captions.say(scene, chance) for _ in range(200)}) > 100
    text = " ".join(captions.say(world.imagine(chance), chance) for _ in range(8000)).lower()
    lists = (
        vocabulary.COLOURS,
        vocabulary.SIZES,
        vocabulary.TEXTURES,
        vocabulary.PLACES,
        vocabulary.RELATIONS,
    )
    names = [
        name for table in (*lists, vocabulary.SHAPES) for said in table.values() for name in said
    ]
    assert [name for name in names if name not in text] == []


def test_most_of_a_scene_is_said():
    chance = random.Random(7)
    read = [asked(captions.say(world.imagine(chance), chance)) for _ in range(2000)]
    assert sum(scene.background is not None for scene in read) > 0.9 * len(read)
    sizes = [group.size for scene in read for group in scene.groups]
    assert sum(size is not None for size in sizes) > 0.5 * len(sizes)


RED = Group(shape="circle", colour="red", count=1)
GREEN = Group(shape="square", colour="green", count=1, size="large")


@pytest.mark.parametrize(
    ("prompt", "scene"),
    [
        ("a red circle", Scene(groups=(RED,))),
        ("Red circle!", Scene(groups=(RED,))),
        ("a red circle on blue", Scene(groups=(RED,), background="blue")),
        (
            "blue background, red ball, top left",
            Scene(groups=(RED,), background="blue", place="top left"),
        ),
        (
            "a red disc to the left of a large green box on a checkered grey backdrop",
            Scene(
                groups=(RED, GREEN),
                background="gray",
                background_texture="checked",
                relation="left of",
            ),
        ),
        (
            "a red circle at the top and a large green square at the bottom",
            Scene(groups=(RED, GREEN), relation="above"),
        ),
        ("red circles", Scene(groups=(Group(shape="circle", colour="red"),))),
        (
            "2 tiny hearts with dots",
            Scene(groups=(Group(shape="heart", count=2, size="small", texture="spotted"),)),
        ),
        ("a shiny red metal circle, please", Scene(groups=(RED,))),
        ("red, round circle", Scene(groups=(RED,))),
        ("a (red:1.3) circle on a [blue] background", Scene(groups=(RED,), background="blue")),
    ],
)
def test_what_a_user_would_type_is_read(prompt, scene):
    assert asked(prompt) == scene


@pytest.mark.parametrize(
    "prompt", ["", " ", "a photo of a cat", "red, blue and green", "二匹の猫 🐈"]
)
def test_a_prompt_that_names_no_shape_asks_for_nothing(prompt):
    assert asked(prompt) is None

"""Captions: each parses back into the scene that it describes, and together they use every word."""

import random

from sdbatch.shapes import captions, vocabulary, world
from sdbatch.shapes.parse import parse_prompt
from sdbatch.shapes.world import Group, Scene


def test_every_caption_parses_back_into_its_scene():
    rng = random.Random(5)
    for _ in range(5000):
        scene = world.random_scene(rng)
        prompt = captions.write_caption(scene, rng)
        result = parse_prompt(prompt)
        assert result is not None, prompt
        assert len(result.groups) == len(scene.groups), prompt
        for actual, group in zip(result.groups, scene.groups, strict=True):
            assert (actual.shape, actual.colour) == (group.shape, group.colour), prompt
            assert actual.count == group.count, prompt
            assert actual.size in (None, group.size), prompt
            assert actual.texture in (None, group.texture), prompt
        for name in ("background", "background_texture", "place", "relation"):
            assert getattr(result, name) in (None, getattr(scene, name)), (name, prompt)


def test_reading_order_puts_the_upper_group_first_where_and_joins_two_groups():
    rng = random.Random(8)
    groups = (
        Group(shape=shape, colour="red", count=1, size="large", texture="plain")
        for shape in ("ring", "square")
    )
    scene = Scene(
        groups=tuple(groups), background="blue", background_texture="plain", relation="below"
    )
    for reading_order, shapes in ((True, ["square", "ring"]), (False, ["ring", "square"])):
        prompts = [
            captions.write_caption(scene, rng, reading_order=reading_order) for _ in range(200)
        ]
        results = [parse_prompt(prompt) for prompt in prompts]
        without_relation = [result for result in results if result.relation is None]
        assert len(without_relation) > 10
        for result in without_relation:
            assert [group.shape for group in result.groups] == shapes


def test_captions_vary_and_use_every_word():
    rng = random.Random(6)
    scene = world.random_scene(rng)
    assert len({captions.write_caption(scene, rng) for _ in range(200)}) > 100
    text = " ".join(
        captions.write_caption(world.random_scene(rng), rng) for _ in range(8000)
    ).lower()
    tables = (
        vocabulary.COLOURS,
        vocabulary.SIZES,
        vocabulary.TEXTURES,
        vocabulary.PLACES,
        vocabulary.RELATIONS,
        vocabulary.SHAPES,
    )
    names = [name for table in tables for synonyms in table.values() for name in synonyms]
    assert [name for name in names if name not in text] == []


def test_captions_mention_most_of_a_scene():
    rng = random.Random(7)
    results = [
        parse_prompt(captions.write_caption(world.random_scene(rng), rng)) for _ in range(2000)
    ]
    assert sum(scene.background is not None for scene in results) > 0.9 * len(results)
    sizes = [group.size for scene in results for group in scene.groups]
    assert sum(size is not None for size in sizes) > 0.5 * len(sizes)

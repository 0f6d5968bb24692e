"""Writes a caption for a scene, in one of the many wordings that people use."""

import random
from collections.abc import Sequence

from sdbatch.shapes import vocabulary
from sdbatch.shapes.world import Group, Scene


def write_caption(scene: Scene, rng: random.Random, *, reading_order: bool = False) -> str:
    """Describe `scene` in the words of a prompt.

    The caption always names the shape, colour and count of each group: the judge cannot work
    without them. It nearly always names the background, size, place and relation. It seldom
    mentions a plain texture or a medium size.

    Args:
        scene: the scene to describe.
        rng: chooses the words.
        reading_order: where only "and" joins two groups, name the upper or left one first. By
            default the caption names the scene's first group first.
    """
    terse = rng.random() < 0.2  # without articles: "red circle, top left, blue background"
    groups = [_describe_group(group, rng, terse) for group in scene.groups]
    if scene.relation is not None:
        and_order = _in_reading_order(groups, scene.relation) if reading_order else groups
        caption = _add_relation(groups, and_order, scene.relation, rng, terse)
    else:
        caption = _add_place(groups[0], scene, rng, terse)
    if not terse and rng.random() < 0.15:
        caption = f"{rng.choice(vocabulary.OPENINGS)} {caption}"
    if rng.random() < 0.95:
        caption = _add_background(caption, scene, rng, terse)
    if rng.random() < 0.1:
        caption = caption[0].upper() + caption[1:] + "."
    return caption


def _describe_group(group: Group, rng: random.Random, terse: bool) -> str:
    names = vocabulary.SHAPES[group.shape]
    noun = _choose_name(names, rng)
    if group.count != 1:
        noun = vocabulary.plural(noun)
    adjectives = [_choose_name(vocabulary.COLOURS[str(group.colour)], rng)]
    suffix = ""
    if group.texture in vocabulary.TEXTURE_SUFFIXES and rng.random() < 0.25:
        suffix = f" {_choose_name(vocabulary.TEXTURE_SUFFIXES[group.texture], rng)}"
    elif group.texture != "plain" or rng.random() < 0.1:
        adjectives.append(_choose_name(vocabulary.TEXTURES[str(group.texture)], rng))
    if rng.random() < (0.2 if group.size == "medium" else 0.85):
        adjectives.append(_choose_name(vocabulary.SIZES[str(group.size)], rng))
    if rng.random() < 0.75:
        adjectives.reverse()  # the usual order in English: size, texture, colour
    else:
        rng.shuffle(adjectives)
    phrase = " ".join([*adjectives, noun]) + suffix
    if group.count == 1 and rng.random() < 0.85:
        return phrase if terse else f"{_article(phrase)} {phrase}"
    return f"{_choose_name(vocabulary.COUNTS[group.count or 1], rng)} {phrase}"


def _in_reading_order(groups: list[str], relation: str) -> list[str]:
    return groups if relation in ("above", "left of") else groups[::-1]


def _add_relation(
    groups: list[str], and_order: list[str], relation: str, rng: random.Random, terse: bool
) -> str:
    """Join two groups by "and", by their places or by their relation."""
    pattern = rng.random()
    if pattern < 0.12:
        return " and ".join(and_order)
    if pattern < 0.3:
        first_place, second_place = (
            _place_phrase(place, rng, terse) for place in vocabulary.RELATION_PLACES[relation]
        )
        conjunction = _choose_name((" and", ","), rng)
        return f"{groups[0]} {first_place}{conjunction} {groups[1]} {second_place}"
    return f"{groups[0]} {_choose_name(vocabulary.RELATIONS[relation], rng)} {groups[1]}"


def _add_place(group: str, scene: Scene, rng: random.Random, terse: bool) -> str:
    if scene.place is None or rng.random() < 0.05:
        return group
    place = _place_phrase(scene.place, rng, terse)
    if rng.random() < 0.2:
        return f"{place}, {group}" if rng.random() < 0.5 else f"{place} {group}"
    return f"{group}, {place}" if terse else f"{group} {place}"


def _place_phrase(place: str, rng: random.Random, terse: bool) -> str:
    name = _choose_name(vocabulary.PLACES[place], rng)
    if terse:
        return name
    return f"{'on' if 'side' in name else rng.choice(('in', 'at'))} the {name}"


def _add_background(caption: str, scene: Scene, rng: random.Random, terse: bool) -> str:
    adjectives = [_choose_name(vocabulary.COLOURS[str(scene.background)], rng)]
    if scene.background_texture != "plain" or rng.random() < 0.07:
        adjectives.insert(
            0 if rng.random() < 0.75 else 1,
            _choose_name(vocabulary.TEXTURES[str(scene.background_texture)], rng),
        )
    surface = " ".join(adjectives)
    noun = f"{surface} {_choose_name(vocabulary.BACKGROUNDS, rng)}"
    if terse:
        return f"{caption}, {noun}" if rng.random() < 0.7 else f"{noun}, {caption}"
    noun_with_article = f"{_article(noun)} {noun}"
    pattern = rng.random()
    if pattern < 0.55:
        preposition = _choose_name(("on", "against", "with", "in front of"), rng)
        return f"{caption} {preposition} {noun_with_article}"
    if pattern < 0.7:
        return f"{caption} on {surface}"
    if pattern < 0.85:
        return f"{caption}, {rng.choice((noun, noun_with_article))}"
    return f"{rng.choice((noun, noun_with_article))} {_choose_name(('with',), rng)} {caption}"


def _choose_name(names: Sequence[str], rng: random.Random) -> str:
    """Choose a name: in half of the cases the first one, otherwise any of them."""
    return names[0] if rng.random() < 0.5 else rng.choice(names)


def _article(phrase: str) -> str:
    return "an" if phrase[0] in "aeiou" else "a"

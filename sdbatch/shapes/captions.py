"""A scene in words, said in one of the many ways that people would."""

import random
from collections.abc import Sequence

from sdbatch.shapes import vocabulary
from sdbatch.shapes.world import Group, Scene


def say(scene: Scene, chance: random.Random, *, in_order: bool = False) -> str:
    """Say `scene` as a prompt.

    What a picture cannot be judged without (shape, colour, count) is always said; its background,
    size, place and relation nearly always; that something is plain, or of medium size, seldom.

    Args:
        scene: what to say.
        chance: chooses the words.
        in_order: of two things that a mere "and" joins, the upper or left one is said first, not
            the scene's first.
    """
    terse = chance.random() < 0.2  # without articles: "red circle, top left, blue background"
    things = [_group(group, chance, terse) for group in scene.groups]
    if scene.relation is not None:
        joined = _in_order(things, scene.relation) if in_order else things
        what = _related(things, joined, scene.relation, chance, terse)
    else:
        what = _placed(things[0], scene, chance, terse)
    if not terse and chance.random() < 0.15:
        what = f"{chance.choice(vocabulary.OPENINGS)} {what}"
    prompt = _on_background(what, scene, chance, terse) if chance.random() < 0.95 else what
    if chance.random() < 0.1:
        prompt = prompt[0].upper() + prompt[1:] + "."
    return prompt


def _group(group: Group, chance: random.Random, terse: bool) -> str:
    names = vocabulary.SHAPES[group.shape]
    name = _one(names, chance)
    if group.count != 1:
        name = vocabulary.plural(name)
    adjectives = [_one(vocabulary.COLOURS[str(group.colour)], chance)]
    after = ""
    if group.texture in vocabulary.AFTER and chance.random() < 0.25:
        after = f" {_one(vocabulary.AFTER[group.texture], chance)}"
    elif group.texture != "plain" or chance.random() < 0.1:
        adjectives.append(_one(vocabulary.TEXTURES[str(group.texture)], chance))
    if chance.random() < (0.2 if group.size == "medium" else 0.85):
        adjectives.append(_one(vocabulary.SIZES[str(group.size)], chance))
    if chance.random() < 0.75:
        adjectives.reverse()  # as English likes it: size, texture, colour
    else:
        chance.shuffle(adjectives)
    phrase = " ".join([*adjectives, name]) + after
    if group.count == 1 and chance.random() < 0.85:
        return phrase if terse else f"{_article(phrase)} {phrase}"
    return f"{_one(vocabulary.COUNTS[group.count or 1], chance)} {phrase}"


def _in_order(things: list[str], relation: str) -> list[str]:
    return things if relation in ("above", "left of") else things[::-1]


def _related(
    things: list[str], joined: list[str], relation: str, chance: random.Random, terse: bool
) -> str:
    way = chance.random()
    if way < 0.12:
        return " and ".join(joined)
    if way < 0.3:
        first, second = (_at(side, chance, terse) for side in vocabulary.SIDES[relation])
        return f"{things[0]} {first}{_one((' and', ','), chance)} {things[1]} {second}"
    return f"{things[0]} {_one(vocabulary.RELATIONS[relation], chance)} {things[1]}"


def _placed(thing: str, scene: Scene, chance: random.Random, terse: bool) -> str:
    if scene.place is None or chance.random() < 0.05:
        return thing
    place = _at(scene.place, chance, terse)
    if chance.random() < 0.2:
        return f"{place}, {thing}" if chance.random() < 0.5 else f"{place} {thing}"
    return f"{thing}, {place}" if terse else f"{thing} {place}"


def _at(place: str, chance: random.Random, terse: bool) -> str:
    name = _one(vocabulary.PLACES[place], chance)
    if terse:
        return name
    return f"{'on' if 'side' in name else chance.choice(('in', 'at'))} the {name}"


def _on_background(what: str, scene: Scene, chance: random.Random, terse: bool) -> str:
    adjectives = [_one(vocabulary.COLOURS[str(scene.background)], chance)]
    if scene.background_texture != "plain" or chance.random() < 0.07:
        adjectives.insert(
            0 if chance.random() < 0.75 else 1,
            _one(vocabulary.TEXTURES[str(scene.background_texture)], chance),
        )
    colour = " ".join(adjectives)
    noun = f"{colour} {_one(vocabulary.BACKGROUNDS, chance)}"
    if terse:
        return f"{what}, {noun}" if chance.random() < 0.7 else f"{noun}, {what}"
    the_noun = f"{_article(noun)} {noun}"
    way = chance.random()
    if way < 0.55:
        return f"{what} {_one(('on', 'against', 'with', 'in front of'), chance)} {the_noun}"
    if way < 0.7:
        return f"{what} on {colour}"
    if way < 0.85:
        return f"{what}, {chance.choice((noun, the_noun))}"
    return f"{chance.choice((noun, the_noun))} {_one(('with',), chance)} {what}"


def _one(names: Sequence[str], chance: random.Random) -> str:
    """Choose a name: the first of several in half of the cases."""
    return names[0] if chance.random() < 0.5 else chance.choice(names)


def _article(phrase: str) -> str:
    return "an" if phrase[0] in "aeiou" else "a"

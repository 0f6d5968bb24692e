"""Scenes: one or two groups of alike shapes on a background, imagined from a seed.

A scene that a prompt asks for has None for whatever the prompt leaves open.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

# A colour and its darker tone, which textures are drawn in: sRGB, 0 to 255.
COLOURS = {
    "red": ((220, 40, 40), (150, 20, 25)),
    "orange": ((245, 135, 25), (190, 90, 5)),
    "yellow": ((250, 220, 40), (200, 170, 10)),
    "green": ((45, 165, 65), (15, 105, 35)),
    "cyan": ((50, 205, 215), (15, 145, 160)),
    "blue": ((45, 85, 215), (20, 45, 145)),
    "purple": ((130, 55, 180), (85, 25, 125)),
    "pink": ((250, 150, 195), (220, 95, 150)),
    "black": ((20, 20, 20), (58, 58, 58)),
    "white": ((250, 250, 250), (210, 210, 210)),
    "gray": ((140, 140, 140), (100, 100, 100)),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond", "cross", "ring", "moon")
RADII = {"small": (11.5, 13.0), "medium": (17.0, 19.0), "large": (25.0, 28.0)}  # pixels of 128
TEXTURES = ("plain", "striped", "spotted")
BACKGROUND_TEXTURES = ("plain", "striped", "checked")
RELATIONS = ("above", "below", "left of", "right of")
# (left, top, right, bottom) as parts of the picture.
PLACES = {
    "top left": (0.0, 0.0, 0.5, 0.5),
    "top": (0.15, 0.0, 0.85, 0.5),
    "top right": (0.5, 0.0, 1.0, 0.5),
    "left": (0.0, 0.15, 0.5, 0.85),
    "center": (0.2, 0.2, 0.8, 0.8),
    "right": (0.5, 0.15, 1.0, 0.85),
    "bottom left": (0.0, 0.5, 0.5, 1.0),
    "bottom": (0.15, 0.5, 0.85, 1.0),
    "bottom right": (0.5, 0.5, 1.0, 1.0),
}
MOST = 5  # of a group
# How many of a size fit: in the whole picture, in a half, in a place.
ROOM = {"small": (5, 5, 3), "medium": (4, 2, 1), "large": (2, 2, 1)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Alike shapes of a scene."""

    shape: str
    colour: str | None = None
    count: int | None = None
    size: str | None = None
    texture: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What a picture shows, or what a prompt asks for: then None is what it leaves open."""

    groups: tuple[Group, ...]
    background: str | None = None
    background_texture: str | None = None
    place: str | None = None  # of a group that is alone
    relation: str | None = None  # of the first group to the second


def is_held_out(group: Group) -> bool:
    """Say whether training never shows this shape in this colour.

    About one pair in seven, so that each colour and each shape is seen in other pairs.
    """
    colour, shape = list(COLOURS).index(str(group.colour)), SHAPES.index(group.shape)
    return (colour + 3 * shape) % 7 == 0


def imagine(chance: random.Random, wanted: Callable[[Scene], bool] = lambda scene: True) -> Scene:
    """Imagine a scene that is `wanted`; the state of `chance` alone decides which."""
    while True:
        scene = _alone(chance) if chance.random() < 0.5 else _pair(chance)
        if wanted(scene):
            return scene


def is_for_training(scene: Scene) -> bool:
    """Say whether no group of `scene` is held out."""
    return not any(is_held_out(group) for group in scene.groups)


def is_for_testing(scene: Scene) -> bool:
    """Say whether the first group of `scene` is held out."""
    return is_held_out(scene.groups[0])


def _alone(chance: random.Random) -> Scene:
    background = chance.choice(list(COLOURS))
    place = chance.choice(list(PLACES)) if chance.random() < 0.6 else None
    return Scene(
        groups=(_group(chance, background, room=0 if place is None else 2),),
        background=background,
        background_texture=_texture(chance, BACKGROUND_TEXTURES),
        place=place,
    )


def _pair(chance: random.Random) -> Scene:
    background = chance.choice(list(COLOURS))
    first = _group(chance, background, room=1)
    second = _group(chance, background, room=1)
    while (first.shape, first.colour) == (second.shape, second.colour):
        second = _group(chance, background, room=1)
    return Scene(
        groups=(first, second),
        background=background,
        background_texture=_texture(chance, BACKGROUND_TEXTURES),
        relation=chance.choice(RELATIONS),
    )


def _group(chance: random.Random, background: str, room: int) -> Group:
    size = chance.choice(list(RADII))
    most = ROOM[size][room]
    return Group(
        shape=chance.choice(SHAPES),
        colour=chance.choice([colour for colour in COLOURS if colour != background]),
        count=1 if chance.random() < 0.35 else chance.randint(1, most),
        size=size,
        texture=texture(chance, size),
    )


def texture(chance: random.Random, size: str) -> str:
    """Choose a shape's texture: small ones have no room for one."""
    return "plain" if size == "small" else _texture(chance, TEXTURES)


def _texture(chance: random.Random, textures: tuple[str, ...]) -> str:
    return "plain" if chance.random() < 0.7 else chance.choice(textures[1:])

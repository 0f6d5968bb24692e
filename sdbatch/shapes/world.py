"""Scenes: one or two groups of identical shapes on a background, and random scenes from a seed.

In a scene that is parsed from a prompt, None marks what the prompt leaves open.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

# Each colour with its darker tone, which draws the textures: sRGB, 0 to 255.
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
# Range of the radius, in pixels of a picture of 128x128.
RADII = {"small": (11.5, 13.0), "medium": (17.0, 19.0), "large": (25.0, 28.0)}
TEXTURES = ("plain", "striped", "spotted")
BACKGROUND_TEXTURES = ("plain", "striped", "checked")
RELATIONS = ("above", "below", "left of", "right of")
# (left, top, right, bottom) as fractions of the picture.
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
MAX_COUNT = 5  # shapes in a group
# How many shapes of a size fit into an area.
CAPACITY = {
    "small": {"picture": 5, "half": 5, "place": 3},
    "medium": {"picture": 4, "half": 2, "place": 1},
    "large": {"picture": 2, "half": 2, "place": 1},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """A group of identical shapes."""

    shape: str
    colour: str | None = None
    count: int | None = None
    size: str | None = None
    texture: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """The content of a picture, or what a prompt asks for; None where the prompt says nothing."""

    groups: tuple[Group, ...]
    background: str | None = None
    background_texture: str | None = None
    place: str | None = None  # only if there is one group
    relation: str | None = None  # of the first group to the second


def is_held_out(group: Group) -> bool:
    """Return whether training excludes this pair of shape and colour.

    About one pair in seven is held out. Each colour and each shape still occurs in other pairs.
    """
    colour, shape = list(COLOURS).index(str(group.colour)), SHAPES.index(group.shape)
    return (colour + 3 * shape) % 7 == 0


def random_scene(rng: random.Random, accept: Callable[[Scene], bool] = lambda scene: True) -> Scene:
    """Generate random scenes until `accept` returns true for one; return that scene."""
    while True:
        scene = _random_single_group(rng) if rng.random() < 0.5 else _random_pair(rng)
        if accept(scene):
            return scene


def is_for_training(scene: Scene) -> bool:
    """Return whether no group of `scene` is held out."""
    return not any(is_held_out(group) for group in scene.groups)


def is_for_testing(scene: Scene) -> bool:
    """Return whether the first group of `scene` is held out."""
    return is_held_out(scene.groups[0])


def _random_single_group(rng: random.Random) -> Scene:
    background = rng.choice(list(COLOURS))
    place = rng.choice(list(PLACES)) if rng.random() < 0.6 else None
    return Scene(
        groups=(_random_group(rng, background, area="picture" if place is None else "place"),),
        background=background,
        background_texture=_choose_texture(rng, BACKGROUND_TEXTURES),
        place=place,
    )


def _random_pair(rng: random.Random) -> Scene:
    background = rng.choice(list(COLOURS))
    first = _random_group(rng, background, area="half")
    second = _random_group(rng, background, area="half")
    while (first.shape, first.colour) == (second.shape, second.colour):
        second = _random_group(rng, background, area="half")
    return Scene(
        groups=(first, second),
        background=background,
        background_texture=_choose_texture(rng, BACKGROUND_TEXTURES),
        relation=rng.choice(RELATIONS),
    )


def _random_group(rng: random.Random, background: str, area: str) -> Group:
    size = rng.choice(list(RADII))
    capacity = CAPACITY[size][area]
    return Group(
        shape=rng.choice(SHAPES),
        colour=rng.choice([colour for colour in COLOURS if colour != background]),
        count=1 if rng.random() < 0.35 else rng.randint(1, capacity),
        size=size,
        texture=random_texture(rng, size),
    )


def random_texture(rng: random.Random, size: str) -> str:
    """Choose the texture of a shape; small shapes are always plain, as a texture does not fit."""
    return "plain" if size == "small" else _choose_texture(rng, TEXTURES)


def _choose_texture(rng: random.Random, textures: tuple[str, ...]) -> str:
    return "plain" if rng.random() < 0.7 else rng.choice(textures[1:])

"""What the networks are shown: rendered scenes, held-out pairs left out."""

import random

import numpy as np
import torch

from sdbatch.shapes import picture, world
from sdbatch.shapes.picture import Spot
from sdbatch.shapes.world import Group, Scene

TILE = 64  # pixels


def imagine(chance: random.Random) -> Scene:
    """Imagine a scene that training may show."""
    return world.imagine(chance, world.is_for_training)


def crowds(seed: str, count: int) -> torch.Tensor:
    """Render `count` pictures that are full of shapes, for the autoencoder to see many edges.

    Returns:
        (count, 3, 128, 128) from -1 to 1, channels last.
    """
    chance = random.Random(seed)
    return _as_tensor([_crowd(chance) for _ in range(count)])


def _crowd(chance: random.Random) -> picture.Pixels:
    background = chance.choice(list(world.COLOURS))
    shapes: list[tuple[Group, Spot]] = []
    for _ in range(40):  # tries: as many as find room
        size = chance.choice(list(world.RADII))
        radius = chance.uniform(*world.RADII[size])
        x, y = (chance.uniform(radius, picture.SIZE - radius) for _ in "xy")
        spot = Spot(x, y, radius)
        if picture.is_free(spot, (taken for _, taken in shapes)):
            shapes.append((_group(chance, background, size), spot))
    return picture.paint(background, chance.choice(world.BACKGROUND_TEXTURES), shapes)


def _group(chance: random.Random, background: str, size: str) -> Group:
    while True:
        group = Group(
            shape=chance.choice(world.SHAPES),
            colour=chance.choice(list(world.COLOURS)),
            texture=world.texture(chance, size),
        )
        if group.colour != background and not world.is_held_out(group):
            return group


def tiles(pictures: torch.Tensor, random_numbers: torch.Generator) -> torch.Tensor:
    """Cut pictures into tiles of 64x64 at a random place; (4 B, 3, 64, 64).

    A quarter of the work a step, and what surrounds a shape is not one background: of whole
    pictures the autoencoder learns first to pass the background, and small things' colours late.
    """
    shift = int(torch.randint(TILE, (), generator=random_numbers))
    cut = pictures.roll((shift, shift), (2, 3)).unfold(2, TILE, TILE).unfold(3, TILE, TILE)
    return (
        cut.permute(0, 2, 3, 1, 4, 5)  # (B, down, across, 3, TILE, TILE)
        .reshape(-1, 3, TILE, TILE)
        .contiguous(memory_format=torch.channels_last)
    )


def render(scenes: list[Scene], seed: str) -> torch.Tensor:
    """Render `scenes`; (B, 3, 128, 128) from -1 to 1, channels last."""
    chance = random.Random(seed)
    return _as_tensor([picture.render(scene, chance) for scene in scenes])


def _as_tensor(pictures: list[picture.Pixels]) -> torch.Tensor:
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1

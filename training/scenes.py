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


def mosaic(pictures: torch.Tensor, random_numbers: torch.Generator) -> torch.Tensor:
    """Shuffle the 64x64 tiles of all pictures: what a tile shows says nothing of its neighbours.

    Or the autoencoder learns first to pass a picture's background as a whole, and is slow to
    see that small things have colours of their own.
    """
    shift = int(torch.randint(TILE, (), generator=random_numbers))
    tiles = pictures.roll((shift, shift), (2, 3)).unfold(2, TILE, TILE).unfold(3, TILE, TILE)
    tiles = tiles.permute(0, 2, 3, 1, 4, 5)  # (B, down, across, 3, TILE, TILE)
    count = tiles.shape[:3].numel()
    order = torch.randperm(count, generator=random_numbers)
    shuffled = tiles.reshape(count, 3, TILE, TILE)[order].reshape(tiles.shape)
    return (
        shuffled.permute(0, 3, 1, 4, 2, 5)
        .reshape(pictures.shape)
        .contiguous(memory_format=torch.channels_last)
    )


def render(scenes: list[Scene], seed: str) -> torch.Tensor:
    """Render `scenes`; (B, 3, 128, 128) from -1 to 1, channels last."""
    chance = random.Random(seed)
    return _as_tensor([picture.render(scene, chance) for scene in scenes])


def _as_tensor(pictures: list[picture.Pixels]) -> torch.Tensor:
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1

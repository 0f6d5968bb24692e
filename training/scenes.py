"""The training pictures: random scenes without held-out pairs, rendered as tensors."""

import random

import numpy as np
import torch

from sdbatch.shapes import picture, world
from sdbatch.shapes.picture import Spot
from sdbatch.shapes.world import Group, Scene

TILE_SIZE = 64  # pixels


def random_scene(rng: random.Random) -> Scene:
    """Generate a random scene without held-out pairs."""
    return world.random_scene(rng, world.is_for_training)


def render_crowds(seed: str, count: int) -> torch.Tensor:
    """Render `count` pictures crowded with shapes, to train the autoencoder on many edges.

    Returns:
        (count, 3, 128, 128) from -1 to 1, channels last.
    """
    rng = random.Random(seed)
    return _as_tensor([_render_crowd(rng) for _ in range(count)])


def _render_crowd(rng: random.Random) -> picture.Pixels:
    background = rng.choice(list(world.COLOURS))
    shapes: list[tuple[Group, Spot]] = []
    for _ in range(40):  # attempts; not all of them find a free spot
        size = rng.choice(list(world.RADII))
        radius = rng.uniform(*world.RADII[size])
        x, y = (rng.uniform(radius, picture.PICTURE_SIZE - radius) for _ in "xy")
        spot = Spot(x, y, radius)
        if picture.is_free(spot, (other for _, other in shapes)):
            shapes.append((_random_group(rng, background, size), spot))
    return picture.paint(background, rng.choice(world.BACKGROUND_TEXTURES), shapes)


def _random_group(rng: random.Random, background: str, size: str) -> Group:
    while True:
        group = Group(
            shape=rng.choice(world.SHAPES),
            colour=rng.choice(list(world.COLOURS)),
            texture=world.random_texture(rng, size),
        )
        if group.colour != background and not world.is_held_out(group):
            return group


def cut_tiles(pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Cut each picture into four tiles of 64x64, after a random shift; (4 B, 3, 64, 64).

    A tile takes a quarter of the work, and its shapes are not surrounded by one background. From
    whole pictures, the autoencoder learns the background first and the colours of small shapes
    late.
    """
    shift = int(torch.randint(TILE_SIZE, (), generator=generator))
    pictures = pictures.roll((shift, shift), (2, 3))
    tiles = pictures.unfold(2, TILE_SIZE, TILE_SIZE).unfold(3, TILE_SIZE, TILE_SIZE)
    return (
        tiles.permute(0, 2, 3, 1, 4, 5)  # (B, rows, columns, 3, TILE_SIZE, TILE_SIZE)
        .reshape(-1, 3, TILE_SIZE, TILE_SIZE)
        .contiguous(memory_format=torch.channels_last)
    )


def render_scenes(scenes: list[Scene], seed: str) -> torch.Tensor:
    """Render `scenes`; (B, 3, 128, 128) from -1 to 1, channels last."""
    rng = random.Random(seed)
    return _as_tensor([picture.render(scene, rng) for scene in scenes])


def _as_tensor(pictures: list[picture.Pixels]) -> torch.Tensor:
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1

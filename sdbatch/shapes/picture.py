"""Renders a scene by plain geometry, for training and as ground truth for the judge."""

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from sdbatch.shapes.world import COLOURS, PLACES, RADII, Group, Scene

Pixels = np.ndarray[Any, np.dtype[np.uint8]]  # (H, W, 3)
Floats = np.ndarray[Any, np.dtype[np.float64]]
PICTURE_SIZE = 128  # pixels, width and height
SUPERSAMPLING = 4  # draw this many times larger, then average, for smooth edges
BAND_WIDTH, BACKGROUND_BAND_WIDTH = 8, 16  # pixels of a stripe or check
MIN_GAP = 5.0  # pixels between two shapes; the border needs half of it
# The areas of the first and the second group, as (left, top, right, bottom) fractions.
HALVES = {
    "above": ((0.0, 0.0, 1.0, 0.5), (0.0, 0.5, 1.0, 1.0)),
    "left of": ((0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)),
}
HALVES["below"] = HALVES["above"][::-1]
HALVES["right of"] = HALVES["left of"][::-1]
WHOLE_PICTURE = (0.0, 0.0, 1.0, 1.0)

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Spot:
    """The location of one shape: its center and radius, in pixels."""

    x: float
    y: float
    radius: float


@cache
def outline(shape: str) -> tuple[tuple[Point, ...], ...]:
    """Return the polygons of `shape`; if there is a second one, it is a hole.

    Coordinates are from -1 to 1; y points down.
    """
    if shape == "circle":
        return (_circle_points(0, 0, 0.92),)
    if shape == "ring":
        return (_circle_points(0, 0, 0.98), _circle_points(0, 0, 0.52))
    if shape == "moon":
        return (_circle_points(0, 0, 0.98), _circle_points(0.46, -0.12, 0.78))
    if shape == "square":
        return (((-0.75, -0.75), (0.75, -0.75), (0.75, 0.75), (-0.75, 0.75)),)
    if shape == "triangle":
        return (((0, -1), (0.9, 0.58), (-0.9, 0.58)),)
    if shape == "diamond":
        return (((0, -1), (0.68, 0), (0, 1), (-0.68, 0)),)
    if shape == "cross":
        near, far = 0.32, 0.95
        arm = [(-near, -far), (near, -far), (near, -near), (far, -near)]
        half = [*arm, (far, near), (near, near)]
        return ((*half, *((-x, -y) for x, y in half)),)
    if shape == "star":
        return (tuple(_from_polar(36 * i - 90, 0.42 if i % 2 else 1.0) for i in range(10)),)
    angles = [2 * math.pi * i / 48 for i in range(48)]
    # The heart curve (16 sin^3 t, 13 cos t - 5 cos 2t - 2 cos 3t - cos 4t), scaled to fit.
    cosines = [5 * math.cos(2 * t) + 2 * math.cos(3 * t) + math.cos(4 * t) for t in angles]
    return (
        tuple(
            (math.sin(t) ** 3 * 0.95, (cosine - 13 * math.cos(t) - 2) / 15.5)
            for t, cosine in zip(angles, cosines, strict=True)
        ),
    )


def render(scene: Scene, rng: random.Random) -> Pixels:
    """Render a complete scene, in which only place and relation may be None.

    Args:
        scene: the scene to render.
        rng: chooses the location of each shape.

    Returns:
        (128, 128, 3) uint8, sRGB.
    """
    groups = zip(scene.groups, arrange(scene, rng), strict=True)
    shapes = [(group, spot) for group, spots in groups for spot in spots]
    return paint(str(scene.background), str(scene.background_texture), shapes)


def paint(background: str, texture: str, shapes: Iterable[tuple[Group, Spot]]) -> Pixels:
    """Paint each shape at its spot, on a background of the given colour and texture."""
    canvas = _background_image(background, texture).copy()
    for group, spot in shapes:
        _paint_shape(canvas, group, spot)
    return np.asarray(canvas.reduce(SUPERSAMPLING))


def arrange(scene: Scene, rng: random.Random) -> list[list[Spot]]:
    """Choose a spot for each shape of each group, so that none touch and none are cut off."""
    if scene.relation is not None:
        areas = list(HALVES[scene.relation])
    else:
        areas = [PLACES[scene.place] if scene.place else WHOLE_PICTURE for _ in scene.groups]
    while True:  # until all shapes of a random arrangement fit
        all_spots: list[Spot] = []
        groups = [
            _arrange_group(group, area, all_spots, rng)
            for group, area in zip(scene.groups, areas, strict=True)
        ]
        if all(groups):
            return groups


def is_free(spot: Spot, other_spots: Iterable[Spot]) -> bool:
    """Return whether a shape at `spot` would be far enough from the `other_spots`."""
    return all(
        math.dist((spot.x, spot.y), (other.x, other.y)) > spot.radius + other.radius + MIN_GAP
        for other in other_spots
    )


def _arrange_group(
    group: Group, area: tuple[float, ...], all_spots: list[Spot], rng: random.Random
) -> list[Spot]:
    """Choose spots for a group and add them to `all_spots`; return [] if a shape does not fit."""
    radius = rng.uniform(*RADII[str(group.size)])
    margin = radius + MIN_GAP / 2
    left, top, right, bottom = (fraction * PICTURE_SIZE for fraction in area)
    spots: list[Spot] = []
    for _ in range(60):
        spot = Spot(
            rng.uniform(left + margin, right - margin),
            rng.uniform(top + margin, bottom - margin),
            radius,
        )
        if is_free(spot, all_spots):
            all_spots.append(spot)
            spots.append(spot)
            if len(spots) == group.count:
                return spots
    return []


def _paint_shape(canvas: Image.Image, group: Group, spot: Spot) -> None:
    """Paint one shape of `group` onto the supersampled canvas."""
    left, top = (
        math.floor((center - spot.radius) * SUPERSAMPLING) - 1 for center in (spot.x, spot.y)
    )
    side = math.ceil(2 * spot.radius * SUPERSAMPLING) + 3
    mask = Image.new("L", (side, side))
    pen = ImageDraw.Draw(mask)
    for fill, polygon in zip((255, 0), outline(group.shape), strict=False):
        points = [(spot.x + x * spot.radius, spot.y + y * spot.radius) for x, y in polygon]
        pen.polygon(
            [(x * SUPERSAMPLING - left, y * SUPERSAMPLING - top) for x, y in points], fill=fill
        )
    rows = (np.arange(side) + top) / SUPERSAMPLING - spot.y
    columns = (np.arange(side) + left) / SUPERSAMPLING - spot.x
    surface = _textured_surface(
        str(group.colour), str(group.texture), rows / BAND_WIDTH, columns / BAND_WIDTH
    )
    canvas.paste(Image.fromarray(surface), (left, top), mask)


@cache
def _background_image(colour: str, texture: str) -> Image.Image:
    bands = np.arange(PICTURE_SIZE * SUPERSAMPLING) / SUPERSAMPLING / BACKGROUND_BAND_WIDTH
    return Image.fromarray(_textured_surface(colour, texture, bands, bands))


def _textured_surface(colour: str, texture: str, rows: Floats, columns: Floats) -> Pixels:
    """Return the pixels of a textured surface.

    Args:
        colour: its name.
        texture: its name.
        rows: the y coordinate of each row of pixels, in band widths.
        columns: the x coordinate of each column of pixels, in band widths.
    """
    tones = np.zeros((len(rows), len(columns)), dtype=np.intp)
    if texture == "striped":
        tones[:] = (np.floor(rows + 0.5) % 2)[:, None]
    elif texture == "checked":
        tones[:] = (np.floor(rows)[:, None] + np.floor(columns)) % 2
    elif texture == "spotted":  # on a grid with a spacing of one and a half bands
        y, x = (grid / 1.5 - np.round(grid / 1.5) for grid in (rows, columns))
        tones[:] = np.hypot(y[:, None], x) < 0.32
    return np.asarray(COLOURS[colour], dtype=np.uint8)[tones]


def _circle_points(x: float, y: float, radius: float) -> tuple[Point, ...]:
    return tuple((x + dx, y + dy) for dx, dy in (_from_polar(7.5 * i, radius) for i in range(48)))


def _from_polar(degrees: float, radius: float) -> Point:
    return radius * math.cos(math.radians(degrees)), radius * math.sin(math.radians(degrees))

"""A scene as pixels, by plain geometry: what the model learns and what the judge is held to."""

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
SIZE = 128  # pixels of a side
FINE = 4  # drawn so much larger and averaged down: smooth edges
BAND, BACKGROUND_BAND = 8, 16  # pixels of a stripe: of shapes, of backgrounds
GAP = 5.0  # pixels between shapes, and to the border
HALVES = {
    "above": ((0.0, 0.0, 1.0, 0.5), (0.0, 0.5, 1.0, 1.0)),
    "left of": ((0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)),
}
HALVES["below"] = HALVES["above"][::-1]
HALVES["right of"] = HALVES["left of"][::-1]
WHOLE = (0.0, 0.0, 1.0, 1.0)

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Spot:
    """Where one shape lies: its middle and its radius, in pixels."""

    x: float
    y: float
    radius: float


@cache
def outline(shape: str) -> tuple[tuple[Point, ...], ...]:
    """Return the polygons of `shape`, x and y (down) from -1 to 1; the second is a hole."""
    if shape == "circle":
        return (_arc(0, 0, 0.92),)
    if shape == "ring":
        return (_arc(0, 0, 0.98), _arc(0, 0, 0.52))
    if shape == "moon":
        return (_arc(0, 0, 0.98), _arc(0.46, -0.12, 0.78))
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
        return (tuple(_polar(36 * i - 90, 0.42 if i % 2 else 1.0) for i in range(10)),)
    turn = [2 * math.pi * i / 48 for i in range(48)]
    lobes = [5 * math.cos(2 * t) + 2 * math.cos(3 * t) + math.cos(4 * t) for t in turn]
    return (
        tuple(
            (math.sin(t) ** 3 * 0.95, (lobe - 13 * math.cos(t) - 2) / 15.5)
            for t, lobe in zip(turn, lobes, strict=True)
        ),
    )


def render(scene: Scene, chance: random.Random) -> Pixels:
    """Render a scene that leaves nothing open but its place; `chance` decides what it leaves open.

    Returns:
        (128, 128, 3) uint8, sRGB.
    """
    groups = zip(scene.groups, arrange(scene, chance), strict=True)
    shapes = [(group, spot) for group, spots in groups for spot in spots]
    return paint(str(scene.background), str(scene.background_texture), shapes)


def paint(background: str, texture: str, shapes: Iterable[tuple[Group, Spot]]) -> Pixels:
    """Paint shapes, each in its spot, on a background of a colour and texture."""
    canvas = _background(background, texture).copy()
    for group, spot in shapes:
        _paint(canvas, group, spot)
    return np.asarray(canvas.reduce(FINE))


def arrange(scene: Scene, chance: random.Random) -> list[list[Spot]]:
    """Find room for each shape of each group: none touch, none are cut off by the border."""
    if scene.relation is not None:
        areas = list(HALVES[scene.relation])
    else:
        areas = [PLACES[scene.place] if scene.place else WHOLE for _ in scene.groups]
    while True:  # until a random arrangement has room for all
        taken: list[Spot] = []
        groups = [
            _fill(group, area, taken, chance)
            for group, area in zip(scene.groups, areas, strict=True)
        ]
        if all(groups):
            return groups


def is_free(spot: Spot, taken: Iterable[Spot]) -> bool:
    """Say whether a shape in `spot` would keep its distance from those that are `taken`."""
    return all(
        math.dist((spot.x, spot.y), (other.x, other.y)) > spot.radius + other.radius + GAP
        for other in taken
    )


def _fill(
    group: Group, area: tuple[float, ...], taken: list[Spot], chance: random.Random
) -> list[Spot]:
    """Place a group's shapes and add them to `taken`; return none if one has no room."""
    radius = chance.uniform(*RADII[str(group.size)])
    margin = radius + GAP / 2
    left, top, right, bottom = (part * SIZE for part in area)
    spots: list[Spot] = []
    for _ in range(60):
        spot = Spot(
            chance.uniform(left + margin, right - margin),
            chance.uniform(top + margin, bottom - margin),
            radius,
        )
        if is_free(spot, taken):
            taken.append(spot)
            spots.append(spot)
            if len(spots) == group.count:
                return spots
    return []


def _paint(canvas: Image.Image, group: Group, spot: Spot) -> None:
    """Paint one shape of `group` at `spot` onto the fine canvas."""
    left, top = (math.floor((middle - spot.radius) * FINE) - 1 for middle in (spot.x, spot.y))
    side = math.ceil(2 * spot.radius * FINE) + 3
    mask = Image.new("L", (side, side))
    pen = ImageDraw.Draw(mask)
    for fill, polygon in zip((255, 0), outline(group.shape), strict=False):
        points = [(spot.x + x * spot.radius, spot.y + y * spot.radius) for x, y in polygon]
        pen.polygon([(x * FINE - left, y * FINE - top) for x, y in points], fill=fill)
    rows = (np.arange(side) + top) / FINE - spot.y
    columns = (np.arange(side) + left) / FINE - spot.x
    surface = _surface(str(group.colour), str(group.texture), rows / BAND, columns / BAND)
    canvas.paste(Image.fromarray(surface), (left, top), mask)


@cache
def _background(colour: str, texture: str) -> Image.Image:
    bands = np.arange(SIZE * FINE) / FINE / BACKGROUND_BAND
    return Image.fromarray(_surface(colour, texture, bands, bands))


def _surface(colour: str, texture: str, rows: Floats, columns: Floats) -> Pixels:
    """Return a surface of a colour in its texture; `rows` and `columns` count in bands."""
    marks = np.zeros((len(rows), len(columns)), dtype=np.intp)
    if texture == "striped":
        marks[:] = (np.floor(rows + 0.5) % 2)[:, None]
    elif texture == "checked":
        marks[:] = (np.floor(rows)[:, None] + np.floor(columns)) % 2
    elif texture == "spotted":  # on a grid one and a half bands apart
        down, across = (grid / 1.5 - np.round(grid / 1.5) for grid in (rows, columns))
        marks[:] = np.hypot(down[:, None], across) < 0.32
    return np.asarray(COLOURS[colour], dtype=np.uint8)[marks]


def _arc(x: float, y: float, radius: float) -> tuple[Point, ...]:
    return tuple((x + px, y + py) for px, py in (_polar(7.5 * i, radius) for i in range(48)))


def _polar(degrees: float, radius: float) -> Point:
    return radius * math.cos(math.radians(degrees)), radius * math.sin(math.radians(degrees))

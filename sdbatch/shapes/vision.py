"""Reads a picture of the world by rules, from its pixels alone: what is where, in which colour.

# H, W = 128; colours are numbered in the order of world.COLOURS.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from sdbatch.shapes.picture import SIZE, Floats, Pixels, outline
from sdbatch.shapes.world import COLOURS, SHAPES

Mask = np.ndarray[Any, np.dtype[np.bool_]]  # (H, W)
Names = np.ndarray[Any, np.dtype[np.intp]]  # (H, W), numbers of colours

LEAST = 30  # pixels of a thing: the thinnest small shape has about 100
EDGE = 6  # pixels of the border that tell the background
SIDE = 32  # of the masks that shapes are compared by
SIZES = ((15.0, "small"), (22.0, "medium"), (math.inf, "large"))  # radii up to
RIM = 3  # pixels of a thing whose tone is not to be trusted
MARKED = 0.12  # of a surface in the darker tone: not plain
BANDED = 0.6  # of the darker tone's variance lies between rows: striped


@dataclass(frozen=True, slots=True)
class Thing:
    """One shape that was seen; its middle in parts of the picture."""

    shape: str
    colour: str
    size: str
    texture: str
    x: float
    y: float


@dataclass(frozen=True, slots=True)
class Sight:
    """All that was seen in a picture."""

    background: str
    background_texture: str
    things: tuple[Thing, ...]


def look(picture: Pixels) -> Sight:
    """Read a picture: (H, W, 3) uint8 of any size, read at 128x128."""
    if picture.shape[:2] != (SIZE, SIZE):
        picture = np.asarray(Image.fromarray(picture).resize((SIZE, SIZE), Image.Resampling.BOX))
    names, dark = _name(picture)
    border = np.ones((SIZE, SIZE), dtype=np.bool_)
    border[EDGE:-EDGE, EDGE:-EDGE] = False
    background = int(np.bincount(names[border]).argmax())
    objects = names != background
    labels, _ = ndimage.label(objects, np.ones((3, 3)))
    things = []
    for number, box in enumerate(ndimage.find_objects(labels), start=1):
        mask = labels[box] == number
        if mask.sum() >= LEAST:
            things.append(_thing(mask, names[box], dark[box], box))
    around = ~ndimage.binary_dilation(objects, iterations=2)
    return Sight(list(COLOURS)[background], _texture(dark, around, "checked"), tuple(things))


def _name(picture: Pixels) -> tuple[Names, Mask]:
    """Return the nearest colour of each pixel, and whether its darker tone is nearer still."""
    red, green, blue = np.moveaxis(picture >> 2, -1, 0)
    nearest = _nearest()[red, green, blue]
    return nearest // 2, nearest % 2 == 1


@cache
def _nearest() -> Names:
    """Return the number of the tone that is nearest to each colour of 6 bits; (64, 64, 64)."""
    tones = np.array(list(COLOURS.values()), dtype=np.float32).reshape(-1, 3)
    levels = np.arange(64, dtype=np.float32) * 4 + 2
    away: Any = sum(
        np.square(np.expand_dims(levels, axis)[..., None] - tones[:, channel])
        for channel, axis in enumerate([(1, 2), (0, 2), (0, 1)])
    )
    return np.asarray(away.argmin(-1))


def _thing(mask: Mask, names: Names, dark: Mask, box: tuple[slice, slice]) -> Thing:
    inner = ndimage.binary_erosion(mask)
    if inner.sum() < LEAST / 2:
        inner = mask
    colour = int(np.bincount(names[inner]).argmax())
    shape = _shape(mask)
    height, width = mask.shape
    _, wide, high = _ideal(shape)
    radius = (height / high + width / wide) / 2
    return Thing(
        shape=shape,
        colour=list(COLOURS)[colour],
        size=next(name for limit, name in SIZES if radius <= limit),
        texture=_texture(dark, ndimage.binary_erosion(mask, iterations=RIM), "spotted"),
        x=(box[1].start + box[1].stop) / 2 / SIZE,
        y=(box[0].start + box[0].stop) / 2 / SIZE,
    )


def _shape(mask: Mask) -> str:
    """Return the shape whose mask, stretched over the same box, overlaps most with `mask`."""
    seen = np.asarray(Image.fromarray(mask).convert("L").resize((SIDE, SIDE), Image.Resampling.BOX))
    part = seen / 255
    flat = mask.shape[1] / mask.shape[0]
    best = {}
    for shape in SHAPES:
        ideal, wide, high = _ideal(shape)
        overlap = np.minimum(part, ideal).sum() / np.maximum(part, ideal).sum()
        best[shape] = overlap - abs(math.log(flat * high / wide)) / 2
    return max(best, key=lambda shape: best[shape])


@cache
def _ideal(shape: str) -> tuple[Floats, float, float]:
    """Return how much of its own box `shape` covers, and how many radii wide and high the box is.

    The cover is (SIDE, SIDE), from 0 to 1.
    """
    radius = 256
    image = Image.new("L", (2 * radius, 2 * radius))
    pen = ImageDraw.Draw(image)
    for fill, polygon in zip((255, 0), outline(shape), strict=False):
        pen.polygon([((1 + x) * radius, (1 + y) * radius) for x, y in polygon], fill=fill)
    box = image.getbbox()
    assert box is not None, f"{shape} has an outline"
    cover = image.resize((SIDE, SIDE), Image.Resampling.BOX, box=box)
    wide, high = (box[2] - box[0]) / radius, (box[3] - box[1]) / radius
    return np.asarray(cover) / 255, wide, high


def _texture(dark: Mask, where: Mask, other: str) -> str:
    """Return the texture of the surface `where`: striped, the `other` one that it may have, or
    plain, as what is too small to tell is.
    """
    marks = dark[where]
    if len(marks) < LEAST or marks.mean() < MARKED:
        return "plain"
    weight = where.sum(1)
    rows = (dark & where).sum(1) / np.maximum(weight, 1)
    between = np.average((rows - marks.mean()) ** 2, weights=weight)
    return "striped" if between > BANDED * marks.var() else other

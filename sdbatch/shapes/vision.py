"""Reads a picture of a scene from its pixels alone, by rules: the shapes, their colours and places.

The arrays have H = W = 128. A colour index counts in the order of world.COLOURS.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from sdbatch.shapes.picture import PICTURE_SIZE, Floats, Pixels, outline
from sdbatch.shapes.world import COLOURS, SHAPES

Mask = np.ndarray[Any, np.dtype[np.bool_]]  # (H, W)
Indices = np.ndarray[Any, np.dtype[np.intp]]  # (H, W), indices of colours

MIN_PIXELS = 30  # of a shape: the thinnest small shape has about 100
BORDER_WIDTH = 6  # pixels: the border determines the background colour
TEMPLATE_SIZE = 32  # pixels: shapes are compared at this width and height
MAX_RADII = ((15.0, "small"), (22.0, "medium"), (math.inf, "large"))  # pixels
RIM_WIDTH = 3  # pixels: the tone of a shape's rim is unreliable
MIN_DARK_SHARE = 0.12  # a surface with less of the darker tone is plain
MIN_ROW_VARIANCE = 0.6  # stripes: share of the darker tone's variance that lies between rows


@dataclass(frozen=True, slots=True)
class DetectedShape:
    """One shape of a picture; x and y of its center are fractions of the picture."""

    shape: str
    colour: str
    size: str
    texture: str
    x: float
    y: float


@dataclass(frozen=True, slots=True)
class PictureContent:
    """The background and the shapes of a picture."""

    background: str
    background_texture: str
    shapes: tuple[DetectedShape, ...]


def read_picture(picture: Pixels) -> PictureContent:
    """Detect the background and the shapes of a picture.

    Args:
        picture: (height, width, 3) uint8 of any size; other sizes are resized to 128x128.
    """
    if picture.shape[:2] != (PICTURE_SIZE, PICTURE_SIZE):
        image = Image.fromarray(picture).resize((PICTURE_SIZE, PICTURE_SIZE), Image.Resampling.BOX)
        picture = np.asarray(image)
    colours, dark = _classify_pixels(picture)
    border = np.ones((PICTURE_SIZE, PICTURE_SIZE), dtype=np.bool_)
    border[BORDER_WIDTH:-BORDER_WIDTH, BORDER_WIDTH:-BORDER_WIDTH] = False
    background = int(np.bincount(colours[border]).argmax())
    foreground = colours != background
    labels, _ = ndimage.label(foreground, np.ones((3, 3)))
    shapes = []
    for label, box in enumerate(ndimage.find_objects(labels), start=1):
        mask = labels[box] == label
        if mask.sum() >= MIN_PIXELS:
            shapes.append(_describe_shape(mask, colours[box], dark[box], box))
    surroundings = ~ndimage.binary_dilation(foreground, iterations=2)
    texture = _classify_texture(dark, surroundings, "checked")
    return PictureContent(list(COLOURS)[background], texture, tuple(shapes))


def _classify_pixels(picture: Pixels) -> tuple[Indices, Mask]:
    """Return the index of each pixel's nearest colour, and whether its darker tone is nearer."""
    red, green, blue = np.moveaxis(picture >> 2, -1, 0)
    tones = _nearest_tones()[red, green, blue]
    return tones // 2, tones % 2 == 1


@cache
def _nearest_tones() -> Indices:
    """Return the index of the nearest tone for each colour of 6 bits per channel; (64, 64, 64)."""
    tones = np.array(list(COLOURS.values()), dtype=np.float32).reshape(-1, 3)
    levels = np.arange(64, dtype=np.float32) * 4 + 2
    distances: Any = sum(
        np.square(np.expand_dims(levels, axis)[..., None] - tones[:, channel])
        for channel, axis in enumerate([(1, 2), (0, 2), (0, 1)])
    )
    return np.asarray(distances.argmin(-1))


def _describe_shape(
    mask: Mask, colours: Indices, dark: Mask, box: tuple[slice, slice]
) -> DetectedShape:
    interior = ndimage.binary_erosion(mask)
    if interior.sum() < MIN_PIXELS / 2:
        interior = mask
    colour = int(np.bincount(colours[interior]).argmax())
    shape = _classify_shape(mask)
    height, width = mask.shape
    _, width_in_radii, height_in_radii = _template(shape)
    radius = (height / height_in_radii + width / width_in_radii) / 2
    without_rim = ndimage.binary_erosion(mask, iterations=RIM_WIDTH)
    return DetectedShape(
        shape=shape,
        colour=list(COLOURS)[colour],
        size=next(size for limit, size in MAX_RADII if radius <= limit),
        texture=_classify_texture(dark, without_rim, "spotted"),
        x=(box[1].start + box[1].stop) / 2 / PICTURE_SIZE,
        y=(box[0].start + box[0].stop) / 2 / PICTURE_SIZE,
    )


def _classify_shape(mask: Mask) -> str:
    """Return the shape whose template, stretched over the same box, overlaps most with `mask`."""
    image = Image.fromarray(mask).convert("L")
    image = image.resize((TEMPLATE_SIZE, TEMPLATE_SIZE), Image.Resampling.BOX)
    coverage = np.asarray(image) / 255
    aspect_ratio = mask.shape[1] / mask.shape[0]
    scores = {}
    for shape in SHAPES:
        template, width, height = _template(shape)
        overlap = np.minimum(coverage, template).sum() / np.maximum(coverage, template).sum()
        scores[shape] = overlap - abs(math.log(aspect_ratio * height / width)) / 2
    return max(scores, key=lambda shape: scores[shape])


@cache
def _template(shape: str) -> tuple[Floats, float, float]:
    """Return the coverage of the bounding box of `shape`, and the box's width and height in radii.

    The coverage is (TEMPLATE_SIZE, TEMPLATE_SIZE), from 0 to 1.
    """
    radius = 256
    image = Image.new("L", (2 * radius, 2 * radius))
    pen = ImageDraw.Draw(image)
    for fill, polygon in zip((255, 0), outline(shape), strict=False):
        pen.polygon([((1 + x) * radius, (1 + y) * radius) for x, y in polygon], fill=fill)
    box = image.getbbox()
    assert box is not None, f"the outline of {shape} covers no pixel"
    coverage = image.resize((TEMPLATE_SIZE, TEMPLATE_SIZE), Image.Resampling.BOX, box=box)
    width, height = (box[2] - box[0]) / radius, (box[3] - box[1]) / radius
    return np.asarray(coverage) / 255, width, height


def _classify_texture(dark: Mask, area: Mask, alternative: str) -> str:
    """Return the texture of the pixels in `area`: "plain", "striped" or `alternative`.

    An area that is too small to classify is plain.
    """
    tones = dark[area]
    if len(tones) < MIN_PIXELS or tones.mean() < MIN_DARK_SHARE:
        return "plain"
    row_sizes = area.sum(1)
    row_means = (dark & area).sum(1) / np.maximum(row_sizes, 1)
    row_variance = np.average((row_means - tones.mean()) ** 2, weights=row_sizes)
    return "striped" if row_variance > MIN_ROW_VARIANCE * tones.var() else alternative

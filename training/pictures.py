"""`python -m training.pictures FOLDER`: write the pictures and masks of jobs/composition.jsonl."""

import random
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from sdbatch.shapes import picture
from sdbatch.shapes.picture import PICTURE_SIZE, Pixels
from sdbatch.shapes.world import Group, Scene

HALF = PICTURE_SIZE // 2


def make_pictures() -> dict[str, Pixels]:
    """Return pictures (H, W, 3) and masks (H, W) by name; a mask is white where to draw."""
    right_half = np.zeros((PICTURE_SIZE, PICTURE_SIZE), np.uint8)
    right_half[:, HALF:] = 255
    corner = np.zeros((2 * PICTURE_SIZE, 2 * PICTURE_SIZE), np.uint8)
    corner[PICTURE_SIZE:, PICTURE_SIZE:] = 255
    tiles = [
        _render(shape, colour, "large", "center", number)
        for number, (shape, colour) in enumerate(
            [("circle", "blue"), ("square", "orange"), ("triangle", "green"), ("cross", "black")]
        )
    ]
    return {
        "heart": _render("heart", "pink", "large", "center", 0),
        "star": _render("star", "yellow", "medium", "left", 2),
        "right_half": right_half,
        "four": np.vstack([np.hstack(tiles[:2]), np.hstack(tiles[2:])]),
        "corner": corner,
    }


def _render(shape: str, colour: str, size: str, place: str, seed: int) -> Pixels:
    group = Group(shape=shape, colour=colour, count=1, size=size, texture="plain")
    scene = Scene(groups=(group,), background="white", background_texture="plain", place=place)
    return picture.render(scene, random.Random(seed))


if __name__ == "__main__":
    for name, pixels in make_pictures().items():
        Image.fromarray(pixels).save(Path(sys.argv[1]) / f"{name}.png", optimize=True)

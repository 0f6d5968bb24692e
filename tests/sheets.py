"""Images of one colour, and their positions on a sheet."""

import io

import numpy as np
from PIL import Image

from sdbatch.report.sheet import IMAGE_SIDE

RED, GREEN, BLUE = (230, 20, 20), (20, 200, 20), (20, 20, 230)


def flat_image(colour, width=8, height=8):
    return np.full((height, width, 3), colour, np.uint8)


def row(colour=RED, size=(8, 8), **values):
    """Return the row of an image of one colour, as an output has it."""
    file = io.BytesIO()
    Image.fromarray(flat_image(colour, *size)).save(file, "PNG")
    return {
        "key": "000000-000000",
        "prompt": "a dog",
        "seed": 7,
        "sampler": "ddim",
        "num_inference_steps": 4,
        "guidance_scale": 7.5,
        "negative_prompt": "",
        "image": {"bytes": file.getvalue(), "path": "000000-000000.png"},
    } | values


def box(picture, colour, tolerance=0):
    """Return left, top, right and bottom of the area of `colour`; None if there is none."""
    matches = (np.abs(np.asarray(picture).astype(int) - colour) <= tolerance).all(-1)
    ys, xs = np.nonzero(matches)
    return (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) if len(xs) else None


def position(picture, colour):
    """Return left and top of an image, and check that it fills its cell."""
    left, top, right, bottom = box(picture, colour)
    assert (right - left, bottom - top) == (IMAGE_SIDE, IMAGE_SIDE)
    return left, top

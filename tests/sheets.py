"""Images of one colour, and where they are on a sheet."""

import io

import numpy as np
from PIL import Image

from sdbatch.report.sheet import SIDE

RED, GREEN, BLUE = (230, 20, 20), (20, 200, 20), (20, 20, 230)


def flat(colour, width=8, height=8):
    return np.full((height, width, 3), colour, np.uint8)


def row(colour=RED, size=(8, 8), **values):
    """Return the row of a drawn image, as an output has it."""
    file = io.BytesIO()
    Image.fromarray(flat(colour, *size)).save(file, "PNG")
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


def box(picture, colour, away=0):
    """Return left, top, right, bottom of where `colour` is in the picture; None: nowhere."""
    found = (np.abs(np.asarray(picture).astype(int) - colour) <= away).all(-1)
    ys, xs = np.nonzero(found)
    return (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) if len(xs) else None


def place(picture, colour):
    """Return the column and the line, in pixels, of an image that fills its place; else fail."""
    left, top, right, bottom = box(picture, colour)
    assert (right - left, bottom - top) == (SIDE, SIDE)
    return left, top

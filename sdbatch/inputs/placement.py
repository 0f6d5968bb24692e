"""Which part of a picture becomes which part of an image of another size.

Boxes are (left, top, right, bottom).
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Size = tuple[int, int]  # width and height
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Placement:
    """The part `source` of a picture becomes the part `target` of an image."""

    picture: Size
    source: tuple[float, float, float, float]
    image: Size
    target: Box

    def apply(
        self, picture: Image.Image, resample: Image.Resampling, border: int | None
    ) -> NDArray[np.uint8]:
        """Return the image, (H, W) or (H, W, 3), whose borders are `border`; None: as the edge.

        `picture` may have another size than the placement's, of the same shape. Where no side
        changes its length, the pixels are copied.
        """
        across, down = (
            here / there for here, there in zip(picture.size, self.picture, strict=True)
        )
        left, top, right, bottom = self.source
        box = (
            left * across,
            top * down,
            min(right * across, picture.width),
            min(bottom * down, picture.height),
        )
        left, top, right, bottom = self.target
        part = np.asarray(picture.resize((right - left, bottom - top), resample, box))
        around = [(top, self.image[1] - bottom), (left, self.image[0] - right), (0, 0)][: part.ndim]
        if border is None:
            return np.pad(part, around, mode="edge")
        return np.pad(part, around, constant_values=border)


def place(fit: Literal["crop", "pad", "stretch"], picture: Size, image: Size) -> Placement:
    """Fit a picture: its middle, all of it between borders, or distorted.

    What is left out or empty on the left and at the top is a whole number of pixels.
    """
    width, height = picture
    whole = (0, 0, *image)
    if fit == "stretch":
        return Placement(picture, (0, 0, width, height), image, whole)
    scales = image[0] / width, image[1] / height
    if fit == "crop":
        scale = max(scales)
        part = min(width, image[0] / scale), min(height, image[1] / scale)
        left, top = (width - part[0]) // 2, (height - part[1]) // 2
        return Placement(picture, (left, top, left + part[0], top + part[1]), image, whole)
    scale = min(scales)
    inside = max(1, round(width * scale)), max(1, round(height * scale))
    left, top = (image[0] - inside[0]) // 2, (image[1] - inside[1]) // 2
    target = (left, top, left + inside[0], top + inside[1])
    return Placement(picture, (0, 0, width, height), image, target)


def same_shape(one: Size, other: Size) -> bool:
    """Tell whether two pictures differ in their shape by no more than rounding to a pixel."""
    return abs(one[0] * other[1] - one[1] * other[0]) < max(*one, *other)

"""What a model family can draw, and how much at a time. No torch: the driver plans with it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

LEAST_LANES = 2  # a guided image


@dataclass(frozen=True)
class Capacity:
    """The lanes that draw fastest on a kind of device."""

    lanes: int  # at the family's default size
    most: int  # of small images


@dataclass(frozen=True)
class ModelLimits:
    """The limits of a model family."""

    multiple_of: int  # pixels: height and width are multiples of it
    side: int  # pixels of an image's side by default
    capacity: Mapping[str, Capacity]  # device kind -> lanes

    def check_size(self, height: int, width: int) -> None:
        """Raise a ValueError if images of this size cannot be drawn."""
        for name, side in (("height", height), ("width", width)):
            if side % self.multiple_of:
                raise ValueError(
                    f"{name} = {side}: must be a multiple of {self.multiple_of} for this model"
                )

    def lanes(self, device: str, height: int, width: int) -> int:
        """Return how many lanes draw fastest: a power of two, fewer for larger images."""
        capacity = self.capacity[device]
        fitting = capacity.lanes * self.side * self.side / (height * width)
        return max(LEAST_LANES, min(capacity.most, 1 << int(math.log2(max(2, fitting)))))

"""What a model family can draw, and how much at a time. No torch: the driver plans with it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

LEAST_LANES = 2  # a guided image
DECODE_GROUP = 4  # images in a decoder call at most: always the same number, padded
ROOM = 0.8  # of a GPU's memory that may be used: libraries choose other ways where it is scarce


@dataclass(frozen=True)
class Memory:
    """The memory of a model in float16, in bytes; of a lane and an image at its default size."""

    weights: float
    lane: float  # of a denoiser call
    image: float  # of a decoder call


@dataclass(frozen=True)
class Capacity:
    """The lanes that draw fastest on a kind of device."""

    lanes: int  # at the family's default size
    most: int  # of small images
    memory: Memory | None = None  # where the device's memory may not hold these lanes


@dataclass(frozen=True)
class CallSizes:
    """How much one call has: rows of the denoiser, images of the decoder or the encoder."""

    lanes: int  # for images of `pixels` pixels and smaller ones
    pixels: int | None  # larger images get fewer lanes; None: as many
    least: int  # lanes of a guided image
    decode_group: int = DECODE_GROUP  # images in a decoder call at most

    def lanes_of(self, height: int, width: int) -> int:
        """Return the lanes for a size, so that a call has no more pixels than it is meant for."""
        lanes = self.lanes
        if self.pixels is not None and height * width > self.pixels:
            lanes = lanes * self.pixels // (height * width)
        return max(self.least, lanes)

    def group_of(self, height: int, width: int) -> int:
        """Return the images of a decoder call: few lanes mean large images or little memory."""
        return max(1, min(self.decode_group, self.lanes_of(height, width) // 2))


@dataclass(frozen=True)
class ModelLimits:
    """The limits of a model family."""

    multiple_of: int  # pixels: height and width are multiples of it
    side: int  # pixels of an image's side by default
    capacity: Mapping[str, Capacity]  # device kind -> lanes
    image_lanes: int = LEAST_LANES  # of a guided image

    def check_size(self, height: int, width: int) -> None:
        """Raise a ValueError if images of this size cannot be drawn."""
        for name, side in (("height", height), ("width", width)):
            if side % self.multiple_of:
                raise ValueError(
                    f"{name} = {side}: must be a multiple of {self.multiple_of} for this model"
                )

    def lanes(
        self, device: str, height: int, width: int, memory: float = math.inf, group: int = 0
    ) -> int:
        """Return how many lanes draw fastest: a power of two, fewer for larger images.

        Args:
            device: its kind.
            height: of the images, in pixels.
            width: of the images, in pixels.
            memory: of the device in bytes, for weights and latents in float16.
            group: images in a decoder call.
        """
        capacity = self.capacity[device]
        pixels = height * width / (self.side * self.side)
        fitting = capacity.lanes / pixels
        if capacity.memory is not None and memory != math.inf:
            each = capacity.memory
            free = ROOM * memory - each.weights - group * each.image * pixels
            fitting = min(fitting, free / (each.lane * pixels))
        return max(LEAST_LANES, min(capacity.most, 1 << int(math.log2(max(2, fitting)))))

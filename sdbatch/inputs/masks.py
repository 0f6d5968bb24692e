"""The mask's soft edge, the part of the picture around it, and what is under it at first.

Masks are (H, W) uint8: how much of each pixel is drawn anew, 255 all of it.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from sdbatch.inputs.placement import Box, Size

_ROWS = 64  # blurred at a time: few enough for the processor's cache
# Of `fill`, as AUTOMATIC1111 has them: a blur's standard deviation, and how often it is laid over.
_FILL_LAYERS = ((256, 1), (64, 1), (16, 2), (4, 4), (2, 2), (0, 1))


def blur(mask: NDArray[np.uint8], sigma: int) -> NDArray[np.uint8]:
    """Blur a mask by a Gaussian of `sigma` pixels, which ends where AUTOMATIC1111's does.

    It has 2 * int(2.5 * sigma + 0.5) + 1 weights, as in modules/processing.py there, and mirrors
    the edges. In integers, so that every machine has the same bits: within one count of the exact
    sum.
    """
    if not sigma or not mask.any():
        return mask
    radius = int(2.5 * sigma + 0.5)
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    kernel = np.rint(weights / weights.sum() * 65536).astype(np.int64)
    kernel[radius] += 65536 - kernel.sum()
    # Twice the radius: what lies farther away is 0 and stays so, and is not mirrored in either.
    left, top, right, bottom = _bounds(mask, 2 * radius)
    near = mask[top:bottom, left:right].astype(np.uint16) * np.uint16(256)
    down = _blur_down(near, kernel.astype(np.uint32))
    across = _blur_down(np.ascontiguousarray(down.T), kernel.astype(np.uint32)).T
    blurred = np.zeros_like(mask)
    blurred[top:bottom, left:right] = (across + 128) >> 8
    return blurred


def _blur_down(values: NDArray[np.uint16], kernel: NDArray[np.uint32]) -> NDArray[np.uint16]:
    """Return the weighted sums of neighbours in a column.

    The kernel's sum is 65536, and no value is above 255 << 8: so sums just fit 32 bits.
    """
    rows, radius = len(values), len(kernel) // 2
    around = np.pad(np.arange(rows), radius, mode="reflect" if rows > 1 else "edge")
    blurred = np.empty_like(values)
    for start in range(0, rows, _ROWS):
        count = min(_ROWS, rows - start)
        near = values[around[start : start + count + 2 * radius]].astype(np.uint32)
        total = np.full((count, *values.shape[1:]), 1 << 15, np.uint32)  # rounds
        for offset, weight in enumerate(kernel):
            total += weight * near[offset : offset + count]
        blurred[start : start + count] = total >> 16
    return blurred


def region_of(mask: NDArray[np.uint8], padding: int, image: Size) -> Box:
    """Return the part of a picture that holds its mask, in the shape of the image if it has room.

    Source: AUTOMATIC1111's modules/masking.py, get_crop_region and expand_crop_region.
    """
    height, width = mask.shape
    left, top, right, bottom = _bounds(mask, padding)
    across, down = right - left, bottom - top
    shape = image[0] / image[1]
    if across / down > shape:
        top, bottom = _widen(top, down, int(across / shape - down), height)
    else:
        left, right = _widen(left, across, int(down * shape - across), width)
    return left, top, right, bottom


def _bounds(mask: NDArray[np.uint8], padding: int) -> Box:
    """Return the box of what is not 0, widened on all sides within the mask."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    height, width = mask.shape
    return (
        max(0, int(columns[0]) - padding),
        max(0, int(rows[0]) - padding),
        min(width, int(columns[-1]) + 1 + padding),
        min(height, int(rows[-1]) + 1 + padding),
    )


def _widen(start: int, length: int, more: int, limit: int) -> tuple[int, int]:
    """Widen a range on both sides, moved and then cut to stay in [0, limit]."""
    length += more
    start = max(0, min(start - more // 2, limit - length))
    return start, min(start + length, limit)


def fill(image: NDArray[np.uint8], mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Spread the colours around the mask under it; what is not masked stays.

    With c the picture and k = 1 - mask, each layer is blur(c * k) / blur(k), with the opacity
    blur(k); the layers are laid over one another, from the widest blur, on black, to none.
    Source of the layers: AUTOMATIC1111's modules/masking.py, fill.
    """
    kept = Image.fromarray(image)
    kept.putalpha(Image.fromarray(255 - mask))
    kept = kept.convert("RGBa")  # multiplied by its alpha
    filled = Image.new("RGBA", kept.size)
    for sigma, times in _FILL_LAYERS:
        layer = kept.filter(ImageFilter.GaussianBlur(sigma)).convert("RGBA")
        for _ in range(times):
            filled.alpha_composite(layer)
    return np.asarray(filled.convert("RGB"))


def blend(
    under: NDArray[np.uint8], over: NDArray[np.uint8], mask: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    """Return `over` where the mask is 255, `under` where it is 0, and mixed in between."""
    mixed = np.empty_like(under)
    for start in range(0, len(mask), _ROWS):  # a few rows in 16 bits, not a whole photo
        rows = slice(start, start + _ROWS)
        share = mask[rows, :, None].astype(np.uint16)
        mixed[rows] = (under[rows] * (255 - share) + over[rows] * share + 127) // 255
    return mixed

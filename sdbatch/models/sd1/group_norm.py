"""GroupNorm and the SiLU after it in three Triton kernels, which keep the layout of the picture.

torch's own GroupNorm on CUDA copies a channels_last picture to another layout, and the convolution
after it copies it back. Only `rewrites.group_norm_silu` imports this module, as Triton is not
installed everywhere.

A picture is split into tiles of PIXELS and CHANNELS, whatever the number of images, and partial
results are added in one order: the bits of an image depend on no other. Sums are in float32, of
differences from a mean, so a large mean costs no precision (Chan et al. 1979, "Updating Formulae
and a Pairwise Algorithm for Computing Sample Variances").

B = images, C = channels, P = pixels of an image, K = chunks of PIXELS pixels.
"""

import torch
import triton
import triton.language as tl
from torch import nn

PIXELS = tl.constexpr(128)
CHANNELS = tl.constexpr(64)  # divides the channels of Stable Diffusion 1.x's layers
_CHUNKS = tl.constexpr(64)  # read at a time when they are combined
# Whether to fuse products and sums is a default of Triton that changes with its versions.
_OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}


class FusedGroupNorm(nn.Module):
    """A GroupNorm by the kernels below.

    Args:
        norm: whose weights, groups and epsilon it takes.
        silu: whether to apply SiLU to the result.
    """

    def __init__(self, norm: nn.GroupNorm, *, silu: bool) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias
        self._groups, self._eps = norm.num_groups, norm.eps
        self._silu = silu

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, C, H, W) in the layout of `x`, which is contiguous or channels_last."""
        last = x.is_contiguous(memory_format=torch.channels_last)
        x = x if last else x.contiguous()
        images, channels, height, width = x.shape
        pixels = height * width
        chunks = triton.cdiv(pixels, PIXELS.value)
        tiles = (chunks, triton.cdiv(channels, CHANNELS.value), images)
        parts = x.new_empty(images, chunks, 2, channels, dtype=torch.float32)
        _measure[tiles](x, parts, channels, pixels, last, **_OPTIONS)
        factors = x.new_empty(images, 2, channels, dtype=torch.float32)
        of_group = channels // self._groups
        padded = triton.next_power_of_2(of_group)
        affine = (self.weight, self.bias, self._eps)
        _combine[(self._groups, images)](
            parts, factors, *affine, channels, pixels, of_group, padded, **_OPTIONS
        )
        y = torch.empty_like(x)
        _apply[tiles](x, factors, y, channels, pixels, last, self._silu, **_OPTIONS)
        return y


@triton.jit
def _tile(
    channels: tl.tensor, pixels: tl.tensor, LAST: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Return the offsets (PIXELS, CHANNELS) of a program's tile, and which are in the image."""
    rows = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)[:, None]
    columns = tl.program_id(1).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    image = tl.program_id(2).to(tl.int64) * channels * pixels
    offsets = rows * channels + columns if LAST else columns * pixels + rows
    return image + offsets, (rows < pixels) & (columns < channels)


@triton.jit
def _measure(
    x: tl.tensor, parts: tl.tensor, channels: tl.tensor, pixels: tl.tensor, LAST: tl.constexpr
) -> None:
    """Write to `parts` (B, K, 2, C) mean and sum of squared differences from it, of each chunk."""
    offsets, inside = _tile(channels, pixels, LAST)
    values = tl.load(x + offsets, inside, 0.0).to(tl.float32)
    chunk, image = tl.program_id(0), tl.program_id(2).to(tl.int64)
    mean = tl.sum(values, 0) / tl.minimum(pixels - chunk * PIXELS, PIXELS)
    rest = tl.where(inside, values - mean[None, :], 0.0)
    columns = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    row = parts + (image * tl.cdiv(pixels, PIXELS) + chunk) * 2 * channels + columns
    tl.store(row, mean, columns < channels)
    tl.store(row + channels, tl.sum(rest * rest, 0), columns < channels)


@triton.jit
def _combine(  # noqa: PLR0913  a kernel takes no objects
    parts: tl.tensor,
    factors: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    eps: tl.tensor,
    channels: tl.tensor,
    pixels: tl.tensor,
    OF_GROUP: tl.constexpr,
    PADDED: tl.constexpr,
) -> None:
    """Write to `factors` (B, 2, C) by what a group's channels are multiplied, and what is added."""
    column = tl.arange(0, PADDED)
    own = tl.program_id(0) * OF_GROUP + column
    image = tl.program_id(1).to(tl.int64)
    chunks = tl.cdiv(pixels, PIXELS)
    first = parts + image * chunks * 2 * channels + own[None, :]
    count = 1.0 * pixels * OF_GROUP
    total = tl.zeros((_CHUNKS, PADDED), tl.float32)
    for start in range(0, chunks, _CHUNKS):
        chunk = start + tl.arange(0, _CHUNKS)[:, None]
        inside = (chunk < chunks) & (column < OF_GROUP)[None, :]
        means = tl.load(first + chunk * 2 * channels, inside, 0.0)
        total += means * tl.minimum(pixels - chunk * PIXELS, PIXELS)
    mean = tl.sum(tl.sum(total, 1), 0) / count
    squares = tl.zeros((_CHUNKS, PADDED), tl.float32)
    for start in range(0, chunks, _CHUNKS):
        chunk = start + tl.arange(0, _CHUNKS)[:, None]
        inside = (chunk < chunks) & (column < OF_GROUP)[None, :]
        means = tl.load(first + chunk * 2 * channels, inside, 0.0)
        rest = tl.where(inside, means - mean, 0.0)
        squares += tl.load(first + (chunk * 2 + 1) * channels, inside, 0.0)
        squares += rest * rest * tl.minimum(pixels - chunk * PIXELS, PIXELS)
    variance = tl.sum(tl.sum(squares, 1), 0) / count
    inside = column < OF_GROUP
    scale = tl.load(weight + own, inside, 0.0).to(tl.float32) / tl.sqrt(variance + eps)
    shift = tl.load(bias + own, inside, 0.0).to(tl.float32) - mean * scale
    tl.store(factors + image * 2 * channels + own, scale, inside)
    tl.store(factors + (image * 2 + 1) * channels + own, shift, inside)


@triton.jit
def _apply(  # noqa: PLR0913  a kernel takes no objects
    x: tl.tensor,
    factors: tl.tensor,
    y: tl.tensor,
    channels: tl.tensor,
    pixels: tl.tensor,
    LAST: tl.constexpr,
    SILU: tl.constexpr,
) -> None:
    """Multiply each channel, add to it, apply SiLU."""
    offsets, inside = _tile(channels, pixels, LAST)
    columns = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    row = factors + tl.program_id(2).to(tl.int64) * 2 * channels + columns
    scale = tl.load(row, columns < channels, 0.0)[None, :]
    shift = tl.load(row + channels, columns < channels, 0.0)[None, :]
    values = tl.load(x + offsets, inside, 0.0).to(tl.float32) * scale + shift
    if SILU:
        values = values / (1.0 + tl.exp(-values))
    tl.store(y + offsets, values.to(y.dtype.element_ty), inside)

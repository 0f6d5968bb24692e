"""Rewrites: the same formulas in other forms, faster and equal but for rounding.

Each is checked against the plain form in float64 and measured by benchmarks/rewrites.py. A job
names those that it wants. What changes no bit needs no name: see blocks.py.

B = images, C = channels, H/W = height and width of latents, L = tokens, D = text width.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.upsampling import Upsample2D
from torch import nn
from torch.nn import functional as F

from sdbatch.engine.cuda import moved
from sdbatch.errors import ModelError
from sdbatch.models.sd1.blocks import Transformer
from sdbatch.models.sd1.graphs import GraphedUNet
from sdbatch.models.sd1.layers import Layer
from sdbatch.models.sd1.row_loras import RowLoras
from sdbatch.models.sd1.shared_prefix import SharedPrefix

_SILUS = {"norm1": "act1", "norm2": "act2", "conv_norm_out": "conv_act"}  # after which norms
GROUP = 8  # rows of text whose keys and values are computed in a call: the number decides bits

Parts = dict[str, Any]  # of a model, by the names of loading.Model's fields


def apply(parts: Parts, names: Sequence[str], adapted: Collection[Layer]) -> None:
    """Rewire the parts of a model.

    Args:
        parts: of the model, with their final weights, on their device.
        names: of the rewrites, from registry.REWRITES.
        adapted: layers to which LoRAs by row add.
    """
    for name in names:
        REWRITES[name](parts, adapted)


class PhaseUpsample(nn.Module):
    """Nearest upsampling and a 3x3 convolution as one transposed convolution, 4x4 with stride 2.

    Two of the three taps of each axis see the same pixel, so their weights are added: 16 products
    of a pixel and a channel instead of 36. The weights are summed in float64, then rounded.
    """

    def __init__(self, upsample: Upsample2D) -> None:
        super().__init__()
        self.conv: Any = upsample.conv  # where the size is not doubled, and for the weights' names
        kernel = _doubling(_doubling(self.conv.weight.double(), 2), 3).transpose(0, 1)
        self.register_buffer("kernel", kernel.to(self.conv.weight), persistent=False)
        self.kernel: torch.Tensor

    def forward(self, x: torch.Tensor, output_size: Sequence[int] | None = None) -> torch.Tensor:
        """Return (B, C', 2H, 2W) for (B, C, H, W), or (B, C', *output_size)."""
        doubled = [2 * side for side in x.shape[2:]]
        if output_size is None or list(output_size) == doubled:
            border = 1
            if self.conv.padding_mode == "circular":  # see tiling.py
                x, border = F.pad(x, (1, 1, 1, 1), "circular"), 3  # of which 2 are cut off again
            return F.conv_transpose2d(x, self.kernel, self.conv.bias, stride=2, padding=border)
        larger: torch.Tensor = self.conv(F.interpolate(x, size=list(output_size), mode="nearest"))
        return larger


def _doubling(weight: torch.Tensor, axis: int) -> torch.Tensor:
    """Return the 4 taps of a transposed convolution for the 3 taps along `axis`.

    Row 2i of the output sees rows i-1, i and i of the input, row 2i+1 sees i, i and i+1.
    """
    first, middle, last = weight.unbind(axis)
    return torch.stack([last, middle + last, first + middle, first], axis)


def phase_upsample(parts: Parts, adapted: Collection[Layer]) -> None:
    """Rewrite the upsampling layers of the UNet and the decoder to which no LoRA by row adds."""
    for part in (parts["unet"], parts["vae"].decoder):
        for module in list(part.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, Upsample2D) and child.conv not in adapted:
                    setattr(module, name, PhaseUpsample(child))


class TextProjection:
    """The keys and values of a text for all layers of the UNet, computed once an image.

    Args:
        layers: the projections of the text, in the UNet's order.
        loras: what LoRAs by row add to them.
    """

    def __init__(self, layers: Sequence[Any], loras: RowLoras) -> None:
        self._layers = layers
        self._loras = loras

    def project(
        self, texts: Sequence[torch.Tensor], loras: Sequence[tuple[float, ...]]
    ) -> list[torch.Tensor]:
        """Return the keys and values (L, K) of each text (L, D): K is the sum of their widths.

        In groups of a fixed size, so the result for a text does not depend on the others.

        Args:
            texts: embeddings.
            loras: the weights of the LoRAs by row, for each text.
        """
        rows = list(zip(map(id, texts), loras, strict=True))
        distinct = dict(zip(rows, texts, strict=True))  # an empty prompt is that of many images
        keys = list(distinct)
        projected: dict[Any, torch.Tensor] = {}
        for start in range(0, len(keys), GROUP):
            group = keys[start : start + GROUP]
            full = group + group[:1] * (GROUP - len(group))
            text = torch.stack([distinct[key] for key in full])
            weights = [key[1] for key in full]
            with self._loras.apply(moved(torch.tensor(weights), text.device) if loras[0] else None):
                values = torch.cat([layer(text) for layer in self._layers], -1)
            projected |= zip(group, values, strict=False)
        return [projected[row] for row in rows]


class _Slice(nn.Module):
    """Takes the place of a projection of the text: returns its columns of what is projected."""

    def __init__(self, start: int, stop: int) -> None:
        super().__init__()
        self._columns = slice(start, stop)

    def forward(self, projected: torch.Tensor) -> torch.Tensor:
        """Return (B, L, width) of (B, L, K)."""
        return projected[..., self._columns]


def text_kv(parts: Parts, _: Collection[Layer]) -> None:
    """Compute keys and values of the text once an image, and not in every tick."""
    layers: list[Any] = []
    stop = 0
    for module in list(parts["unet"].modules()):
        if isinstance(module, Attention) and module.is_cross_attention:
            for name in ("to_k", "to_v"):
                layer = getattr(module, name)
                start, stop = stop, stop + layer.out_features
                layers.append(layer)
                setattr(module, name, _Slice(start, stop))
    parts["text_projection"] = TextProjection(layers, parts["row_loras"])


def graphs(parts: Parts, _: Collection[Layer]) -> None:
    """Call the UNet as CUDA graphs. It draws the same bits."""
    parts["unet"] = GraphedUNet(parts["unet"])


def group_norm_silu(parts: Parts, adapted: Collection[Layer]) -> None:
    """Join each GroupNorm of the UNet and the decoder to which no LoRA by row adds with its SiLU.

    Also the norms of the transformers, which have none, so that no norm changes the layout.

    Raises:
        ModelError: Triton is missing.
    """
    try:
        from sdbatch.models.sd1.group_norm import FusedGroupNorm
    except ImportError as error:
        raise ModelError(
            "engine.rewrites = 'group_norm_silu': triton is not installed. Install a torch wheel "
            "for CUDA, which brings it, or leave group_norm_silu out."
        ) from error
    for part in (parts["unet"], parts["vae"].decoder):
        for module in list(part.modules()):
            for name, silu in _SILUS.items():
                norm = getattr(module, name, None)
                has_silu = isinstance(getattr(module, silu, None), nn.SiLU)
                if isinstance(norm, nn.GroupNorm) and has_silu and norm not in adapted:
                    setattr(module, name, FusedGroupNorm(norm, silu=True))
                    setattr(module, silu, nn.Identity())
            if isinstance(module, Transformer) and module.norm not in adapted:
                module.norm = FusedGroupNorm(module.norm, silu=False)


def shared_prefix(parts: Parts, _: Collection[Layer]) -> None:
    """Compute once what the lanes of a guided image have in common."""
    parts["shared_prefix"] = SharedPrefix(parts["unet"], parts["row_loras"])


REWRITES: dict[str, Callable[[Parts, Collection[Layer]], None]] = {
    "graphs": graphs,
    "group_norm_silu": group_norm_silu,
    "phase_upsample": phase_upsample,
    "shared_prefix": shared_prefix,
    "text_kv": text_kv,
}

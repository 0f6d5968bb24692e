"""Seamless tiling: opposite edges of a picture are neighbours, in each convolution with borders.

Only the encoder's downsampling keeps its border of zeros at the right and below, as in diffusers
and AUTOMATIC1111: there the border is no part of the convolution.
"""

from torch import nn


def wrap_edges(part: nn.Module) -> None:
    """Pad the input of each convolution of a UNet or a VAE with what is at the opposite edge."""
    for layer in part.modules():
        if isinstance(layer, nn.Conv2d):
            layer.padding_mode = "circular"

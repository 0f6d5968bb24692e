"""Enlarges what the first pass of hires fix has drawn.

C = latent channels, h/w = latent height/width, H/W = image height/width in pixels.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from sdbatch.engine.request import Request
from sdbatch.sampling import LATENT_UPSCALERS

_FILTERS = {"lanczos": Image.Resampling.LANCZOS, "nearest": Image.Resampling.NEAREST}


def enlarge_latents(latents: torch.Tensor, first: Request, second: Request) -> torch.Tensor:
    """Return a first pass's latents (C, h, w) at the size of the second, by its upscaler."""
    mode, antialias = LATENT_UPSCALERS[second.hires_upscaler]
    height, width = latents.shape[1:]
    size = (height * second.height // first.height, width * second.width // first.width)
    return torch.nn.functional.interpolate(latents[None], size, mode=mode, antialias=antialias)[0]


def with_enlarged(request: Request, picture: NDArray[np.uint8]) -> Request:
    """Return a second pass with the first one's picture (H, W, 3), enlarged, as its image."""
    size = (request.width, request.height)
    enlarged = Image.fromarray(picture).resize(size, _FILTERS[request.hires_upscaler])
    return request.model_copy(update={"inputs": {"image": np.asarray(enlarged)}})

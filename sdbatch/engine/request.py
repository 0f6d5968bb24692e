"""What goes into the engine and what comes out."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One image to draw: all values resolved and in range."""

    prompt: str
    negative_prompt: str
    seed: int  # [0, 2**63); torch's CPU generator keeps the low 32 bits
    sampler: str  # a key of samplers.SAMPLERS
    num_inference_steps: int
    guidance_scale: float  # 1 or less: unguided
    height: int  # pixels, a multiple of 8
    width: int  # pixels, a multiple of 8

    @property
    def guided(self) -> bool:
        """Tell whether the image takes two lanes: with the prompt, and with the negative prompt."""
        return self.guidance_scale > 1.0

    @property
    def kind(self) -> tuple[str, int, int, int]:
        """Return what requests must share to step together."""
        return (self.sampler, self.num_inference_steps, self.height, self.width)


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """A drawn image and what was learned of its prompt."""

    image: NDArray[np.uint8]  # (H, W, 3), RGB
    prompt_tokens: int  # without the begin and end marks, before truncation
    prompt_truncated: bool  # the prompt or the negative prompt lost tokens

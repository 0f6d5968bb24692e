"""What goes into the engine and what comes out."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One image to draw: all values resolved and in range."""

    prompt: str
    negative_prompt: str = ""
    seed: int  # [0, 2**63); torch's CPU generator keeps the low 32 bits
    sampler: str  # one of samplers.NAMES
    num_inference_steps: int
    guidance_scale: float  # 1 or less: unguided
    guidance_rescale: float = 0.0  # [0, 1]: Lin et al. 2023, sec. 3.4
    guidance_start: float = 0.0  # guided from this part of the steps on, [0, 1]
    guidance_stop: float = 1.0  # and up to this one
    height: int  # pixels, a multiple of 8
    width: int  # pixels, a multiple of 8
    clip_skip: int = 0  # last layers of the text encoder that are left out
    eta: float = 0.0  # [0, 1]: noise that ddim and tcd add
    prompt_weights: bool = False  # read (word:1.2) and [word] as AUTOMATIC1111 does
    chunk_prompts: bool = False  # encode a long prompt in chunks of 75 tokens: else it is cut

    @property
    def guided(self) -> bool:
        """Tell whether the image takes two lanes: with the prompt, and with the negative prompt."""
        return self.guidance_scale > 1.0 and self.guidance_start < self.guidance_stop

    @property
    def kind(self) -> tuple[str, int, float]:
        """Return what requests of one shape must share to step together."""
        return (self.sampler, self.num_inference_steps, self.eta)

    def guided_ticks(self, ticks: int) -> tuple[int, int]:
        """Return the ticks [start, stop) of so many in which the image is guided."""
        if not self.guided:
            return 0, 0
        ends = (self.guidance_start * ticks, self.guidance_stop * ticks)
        return int(ends[0] + 1e-6), int(ends[1] + 1e-6)  # 0.29 * 100 is 28.999999999999996


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """A drawn image and what was learned of it."""

    image: NDArray[np.uint8]  # (H, W, 3), RGB
    prompt_tokens: int  # without the begin and end marks, before truncation
    prompt_truncated: bool  # the prompt or the negative prompt lost tokens
    lanes: int  # rows of the UNet batch that it was drawn in, the fewest: other counts differ
    exact: bool = True  # every batch it was in had the engine's own shape: bit for bit the same
    nsfw: bool | None = None  # None: not checked
    nsfw_scores: tuple[float, ...] | None = None  # by concept of the checker; above 0 is flagged


@dataclass(frozen=True, slots=True)
class Follow:
    """Who wants to see an image on its way. Called by a thread of the engine's: must not block."""

    step: Callable[[int, int], None]  # so many ticks are done, of so many
    preview: Callable[[Drawn], None]  # what it would be if it ended here
    previews: int = 0  # how many of these, evenly spread over its ticks

    def is_due(self, tick: int, ticks: int) -> bool:
        """Tell whether a preview is due after so many ticks of so many."""
        if not self.previews:
            return False
        return tick < ticks and tick * (self.previews + 1) % ticks < self.previews + 1


@dataclass(slots=True)
class Usage:
    """What an engine has done so far."""

    seconds: float = 0.0  # since its first request
    idle_seconds: float = 0.0  # of these, without any request
    ticks: int = 0  # UNet calls
    rows: int = 0  # of all those calls
    filled: int = 0  # of these rows, how many were no padding
    shrunk: list[str] = field(default_factory=list)  # what lanes were halved to, and why

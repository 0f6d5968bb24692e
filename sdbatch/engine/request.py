"""What goes into an engine and what comes out; the interface of every engine. No torch here."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import astuple, dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sdbatch.sampling import MOST_STEPS, SIDE_MULTIPLE, Sampling


class Request(Sampling):
    """One image to draw: all sampling values resolved and in range.

    torch's CPU generator keeps the low 32 bits of the seed.
    """

    prompt: str
    # The row's pictures: `image` (H, W, 3) and `mask` (H, W), uint8, of the request's own height
    # and width. Where the mask is at least 128 the image is drawn anew.
    inputs: Mapping[str, Any] = {}
    second_pass: bool = False  # of hires fix: its first latents are those of the first pass
    first_steps: int = 0  # of a second pass: num_inference_steps of the first

    def __hash__(self) -> int:
        """Hash by what tells most requests apart; inputs hold arrays, which have no hash."""
        return hash((self.prompt, self.seed, self.height, self.width))

    def steps_from_picture(self) -> tuple[int, int]:
        """Return the steps of the schedule, and the first one that is drawn from a picture.

        Sources: Meng et al. 2022 (SDEdit), sec. 3; AUTOMATIC1111's
        modules/sd_samplers_common.py, setup_img2img_steps, whose hires fix draws all of its steps.

        Raises:
            ValueError: the strength leaves no step.
        """
        steps = self.num_inference_steps
        if self.second_pass:
            steps = int(steps / min(self.strength, 0.999))
            if steps > MOST_STEPS:
                raise ValueError(
                    f"hires_steps = {self.num_inference_steps}: must be at most "
                    f"{int(MOST_STEPS * self.strength)} with hires_strength {self.strength:g}, as "
                    f"the whole schedule has at most {MOST_STEPS} steps"
                )
            return steps, max(0, steps - self.num_inference_steps)
        if self.compat == "a1111" and self.strength:
            drawn = int(min(self.strength, 0.999) * steps) + 1
        else:
            drawn = min(int(steps * self.strength), steps)
        if not drawn:
            raise ValueError(
                f"strength = {self.strength:g}: must leave a step, and {steps} steps times it are "
                f"none. Set it higher, or num_inference_steps"
            )
        return steps, steps - drawn

    def enlarged(self) -> "Request | None":
        """Return the second pass of hires fix, without its picture; None if there is none."""
        if self.hires_scale == 1:
            return None
        height, width = (
            int(side * self.hires_scale) // SIDE_MULTIPLE * SIDE_MULTIPLE
            for side in (self.height, self.width)
        )
        return self.model_copy(
            update={
                "height": height,
                "width": width,
                "num_inference_steps": self.hires_steps or self.num_inference_steps,
                "strength": self.hires_strength,
                "hires_scale": 1.0,
                "inputs": {},
                "second_pass": True,
                "first_steps": self.num_inference_steps,
            }
        )

    @property
    def guided(self) -> bool:
        """Tell whether the image takes two lanes: with the prompt, and with the negative prompt."""
        in_ticks = self.guidance_start < self.guidance_stop
        in_noise = self.guidance_sigma_low < self.guidance_sigma_high
        return self.guidance_scale > 1.0 and in_ticks and in_noise

    def guided_ticks(self, sigmas: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Return in which ticks the image is guided, (ticks,), by the noise level of each.

        A denoiser call that reuses what an earlier one computed has the lanes of that one.

        Source of the interval in sigma: Kynkäänniemi et al. 2024, "Applying Guidance in a Limited
        Interval", sec. 3: where sigma is in (low, high]; elsewhere the prompt alone counts.
        """
        guided = np.zeros(len(sigmas), np.bool_)
        if self.guided:
            start, stop = self.guidance_start * len(sigmas), self.guidance_stop * len(sigmas)
            guided[int(start + 1e-6) : int(stop + 1e-6)] = True  # 0.29 * 100 is 28.99..
            guided &= (self.guidance_sigma_low < sigmas) & (sigmas <= self.guidance_sigma_high)
        whole = np.arange(len(sigmas)) // self.cache_interval * self.cache_interval
        return guided[whole]


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """A drawn image and its facts."""

    image: NDArray[np.uint8]  # (H, W, 3), RGB
    prompt_tokens: int  # without the begin and end marks, before truncation
    prompt_truncated: bool  # the prompt or the negative prompt lost tokens
    lanes: int  # rows of the smallest denoiser batch it was drawn in: bits depend on the number
    exact: bool = True  # all its batches had the engine's full shape, so its bits are reproducible
    decoded_again: bool = False  # in float32: it was not finite in the engine's dtype
    nsfw: bool | None = None  # None: not checked
    nsfw_scores: tuple[float, ...] | None = None  # by concept of the checker; above 0 is flagged


@dataclass(frozen=True, slots=True)
class Follow:
    """Callbacks that show an image in progress. Engine threads call them: they must not block."""

    step: Callable[[int, int], None]  # ticks done, ticks in all
    preview: Callable[[Drawn], None]  # the image as it would be if it ended here
    previews: int = 0  # the number of previews, evenly spread over the ticks

    def is_due(self, tick: int, ticks: int) -> bool:
        """Tell whether a preview is due after `tick` of `ticks` ticks."""
        if not self.previews:
            return False
        return tick < ticks and tick * (self.previews + 1) % ticks < self.previews + 1


@dataclass(slots=True)
class Usage:
    """What an engine has done so far."""

    seconds: float = 0.0  # since its first request
    idle_seconds: float = 0.0  # of these, without any request
    ticks: int = 0  # denoiser calls
    rows: int = 0  # of all those calls
    filled: int = 0  # of these rows, those that were not padding
    shrunk: list[str] = field(default_factory=list)  # each reduction of lanes, with its reason

    def __add__(self, other: "Usage") -> "Usage":
        """Return what two engines have done together."""
        return Usage(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


class EngineProtocol(Protocol):
    """What draws requests: engine.Engine, or an engine for models that do not gain from lanes."""

    @property
    def device(self) -> Mapping[str, Any]:
        """Return the facts of its device, from device.device_facts; none if it draws on none."""

    @property
    def usage(self) -> Usage:
        """Return what the engine has done so far."""

    @property
    def stalled_seconds(self) -> float:
        """Return the seconds without progress while there is work; infinite if it has ended."""

    def submit(
        self, request: Request, *, exact: bool = True, follow: Follow | None = None
    ) -> Future[Drawn]:
        """Queue a request; see engine.Engine.submit."""

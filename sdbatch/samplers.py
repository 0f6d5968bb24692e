"""The samplers that a user picks by name, and the diffusers scheduler behind each; no torch here.

A name is that of a sampler, or of a sampler with a sigma schedule: `euler`, `euler_karras`.
"""

from dataclasses import dataclass, field
from typing import Any

CONVERTED = ("karras", "exponential", "beta")  # schedules that diffusers computes by itself
AYS = "ays"  # Align Your Steps, Sabour et al. 2024: timesteps made for Stable Diffusion 1.5


@dataclass(frozen=True)
class Sampler:
    """One sampler: its names in diffusers and in AUTOMATIC1111."""

    scheduler: str
    title: str
    arguments: dict[str, Any] = field(default_factory=dict)
    schedules: tuple[str, ...] = ()
    takes_eta: bool = False


_MULTISTEP, _ANY = "DPMSolverMultistepScheduler", (*CONVERTED, AYS)
_SDE = {"algorithm_type": "sde-dpmsolver++"}

SAMPLERS = {
    # latents are no pixels in [-1, 1], so they are not clipped to it
    "ddim": Sampler("DDIMScheduler", "DDIM", {"clip_sample": False}, takes_eta=True),
    "pndm": Sampler("PNDMScheduler", "PLMS", {"skip_prk_steps": True}),  # as SD 1.x ships it
    "euler": Sampler("EulerDiscreteScheduler", "Euler", schedules=_ANY),
    "euler_a": Sampler("EulerAncestralDiscreteScheduler", "Euler a"),
    "heun": Sampler("HeunDiscreteScheduler", "Heun", schedules=_ANY),
    "lms": Sampler("LMSDiscreteScheduler", "LMS", schedules=CONVERTED),
    "dpm2": Sampler("KDPM2DiscreteScheduler", "DPM2", schedules=CONVERTED),
    "dpm2_a": Sampler("KDPM2AncestralDiscreteScheduler", "DPM2 a", schedules=CONVERTED),
    "dpmpp_2m": Sampler(_MULTISTEP, "DPM++ 2M", {"algorithm_type": "dpmsolver++"}, _ANY),
    "dpmpp_2m_sde": Sampler(_MULTISTEP, "DPM++ 2M SDE", _SDE, _ANY),
    "dpmpp_3m_sde": Sampler(_MULTISTEP, "DPM++ 3M SDE", {**_SDE, "solver_order": 3}, _ANY),
    "dpmpp_2s": Sampler(
        "DPMSolverSinglestepScheduler", "DPM++ 2S", {"algorithm_type": "dpmsolver++"}, _ANY
    ),
    "dpmpp_sde": Sampler("DPMSolverSDEScheduler", "DPM++ SDE", schedules=CONVERTED),
    "unipc": Sampler("UniPCMultistepScheduler", "UniPC", schedules=CONVERTED),
    "deis": Sampler("DEISMultistepScheduler", "DEIS", schedules=CONVERTED),
    "lcm": Sampler("LCMScheduler", "LCM"),
    "tcd": Sampler("TCDScheduler", "TCD", takes_eta=True),
}
SUFFIXES = {
    "karras": "Karras",
    "exponential": "Exponential",
    "beta": "Beta",
    AYS: "Align Your Steps",
}

NAMES = tuple(
    name
    for plain, sampler in SAMPLERS.items()
    for name in (plain, *(f"{plain}_{schedule}" for schedule in sampler.schedules))
)


def split(name: str) -> tuple[Sampler, str | None]:
    """Return the sampler and the sigma schedule, if any, of `name`, one of NAMES."""
    if name in SAMPLERS:
        return SAMPLERS[name], None
    plain, _, schedule = name.rpartition("_")
    return SAMPLERS[plain], schedule


def title(name: str) -> str:
    """Return AUTOMATIC1111's name for `name`."""
    sampler, schedule = split(name)
    return f"{sampler.title} {SUFFIXES[schedule]}" if schedule else sampler.title

"""The samplers that a user picks by name, and the diffusers scheduler behind each; no torch here.

A name is that of a sampler, or of a sampler with a sigma schedule: `euler`, `euler_karras`. Other
tools' names are found by `find`.
"""

import re
from dataclasses import dataclass, field
from typing import Any

CONVERTED = ("karras", "exponential", "beta")  # schedules that diffusers computes by itself
AYS = "ays"  # Align Your Steps, Sabour et al. 2024: timesteps made for Stable Diffusion 1.5
TRAILING = "trailing"  # the last timestep first: Lin et al. 2023, sec. 3.3; Hyper-SD, PCM


@dataclass(frozen=True)
class Sampler:
    """One sampler: its names in diffusers and in AUTOMATIC1111."""

    scheduler: str
    title: str
    arguments: dict[str, Any] = field(default_factory=dict)
    schedules: tuple[str, ...] = ()
    takes_eta: bool = False
    calls_per_step: int = 1  # of the denoiser, as AUTOMATIC1111 counts them: the last step has one


_MULTISTEP, _ANY = "DPMSolverMultistepScheduler", (*CONVERTED, AYS)
_SDE = {"algorithm_type": "sde-dpmsolver++"}

SAMPLERS = {
    # latents are no pixels in [-1, 1], so they are not clipped to it
    "ddim": Sampler(
        "DDIMScheduler", "DDIM", {"clip_sample": False}, schedules=(TRAILING,), takes_eta=True
    ),
    "pndm": Sampler("PNDMScheduler", "PLMS", {"skip_prk_steps": True}),  # as SD 1.x ships it
    "euler": Sampler("EulerDiscreteScheduler", "Euler", schedules=_ANY),
    "euler_a": Sampler("EulerAncestralDiscreteScheduler", "Euler a"),
    "heun": Sampler("HeunDiscreteScheduler", "Heun", schedules=_ANY, calls_per_step=2),
    "lms": Sampler("LMSDiscreteScheduler", "LMS", schedules=CONVERTED),
    "dpm2": Sampler("KDPM2DiscreteScheduler", "DPM2", schedules=CONVERTED, calls_per_step=2),
    "dpm2_a": Sampler(
        "KDPM2AncestralDiscreteScheduler", "DPM2 a", schedules=CONVERTED, calls_per_step=2
    ),
    "dpmpp_2m": Sampler(_MULTISTEP, "DPM++ 2M", {"algorithm_type": "dpmsolver++"}, _ANY),
    "dpmpp_2m_sde": Sampler(_MULTISTEP, "DPM++ 2M SDE", _SDE, _ANY),
    "dpmpp_3m_sde": Sampler(_MULTISTEP, "DPM++ 3M SDE", {**_SDE, "solver_order": 3}, _ANY),
    "dpmpp_2s": Sampler(
        "DPMSolverSinglestepScheduler", "DPM++ 2S", {"algorithm_type": "dpmsolver++"}, _ANY
    ),
    "dpmpp_sde": Sampler(
        "DPMSolverSDEScheduler", "DPM++ SDE", schedules=CONVERTED, calls_per_step=2
    ),
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
    TRAILING: "Trailing",
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


def _normal(name: str) -> str:
    """Return `name` without case, spaces and marks: "DPM++ 2M Karras" is dpmpp2mkarras."""
    return re.sub("[^a-z0-9]", "", name.casefold().replace("++", "pp"))


# Names of k-diffusion (`k_`, `sample_`), ComfyUI and InvokeAI (`kdpm_2`), besides those that follow
# from AUTOMATIC1111's titles and diffusers' classes. DPM++ 2S a is none of ours: it is ancestral.
_OTHER_NAMES = {
    "pndm": ("plms",),
    "euler": ("k_euler", "sample_euler"),
    "euler_a": ("euler_ancestral", "k_euler_a", "k_euler_ancestral", "sample_euler_ancestral"),
    "heun": ("k_heun", "sample_heun"),
    "lms": ("k_lms", "sample_lms"),
    "dpm2": ("k_dpm_2", "sample_dpm_2"),
    "dpm2_a": ("dpm_2_ancestral", "k_dpm_2_a", "k_dpm_2_ancestral", "sample_dpm_2_ancestral"),
    "dpmpp_2m": ("k_dpmpp_2m", "sample_dpmpp_2m"),
    "dpmpp_2m_sde": ("k_dpmpp_2m_sde", "sample_dpmpp_2m_sde", "dpmpp_2m_sde_gpu"),
    "dpmpp_3m_sde": ("k_dpmpp_3m_sde", "sample_dpmpp_3m_sde", "dpmpp_3m_sde_gpu"),
    "dpmpp_sde": ("k_dpmpp_sde", "sample_dpmpp_sde", "dpmpp_sde_gpu"),
    "unipc": ("uni_pc_bh2",),
}
# DiffusionDB's column `sampler`; 9 is any other sampler.
# Source: Wang et al. 2022, https://huggingface.co/datasets/poloclub/diffusiondb
NUMBERS = {
    1: "ddim",
    2: "pndm",
    3: "euler",
    4: "euler_a",
    5: "heun",
    6: "dpm2",
    7: "dpm2_a",
    8: "lms",
}


def _find_aliases() -> dict[str, str]:
    aliases = {str(number): name for number, name in NUMBERS.items()}
    for plain, sampler in SAMPLERS.items():
        aliases.setdefault(_normal(sampler.scheduler), plain)  # the first, diffusers' default
        names = (plain, sampler.title, *_OTHER_NAMES.get(plain, ()))
        for other in names:
            aliases[_normal(other)] = plain
            for schedule in sampler.schedules:
                for label in (schedule, SUFFIXES[schedule]):
                    aliases[_normal(f"{other} {label}")] = f"{plain}_{schedule}"
    return aliases


_ALIASES = _find_aliases()


def find(name: object) -> str | None:
    """Return our name for a sampler that any tool names, or DiffusionDB numbers; None: unknown."""
    if isinstance(name, float) and name.is_integer():
        name = int(name)  # numbers become floats where a cell is empty
    known = isinstance(name, str | int) and not isinstance(name, bool)
    return _ALIASES.get(_normal(str(name))) if known else None

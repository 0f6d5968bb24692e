"""The samplers by name: diffusers' schedulers, unmodified."""

from typing import Any

import diffusers

# The names are those of job.Sampler; a test holds the two together.
SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}),  # latents are no pixels in [-1, 1]
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),  # PLMS, as Stable Diffusion 1.x ships it
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpmpp_2m_karras": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver++", "use_karras_sigmas": True},
    ),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
}


def make_scheduler(sampler: str, model_config: dict[str, Any], num_inference_steps: int) -> Any:
    """Build the diffusers scheduler of `sampler` with its timesteps set.

    Args:
        sampler: a key of SAMPLERS.
        model_config: the scheduler config that came with the model: its betas and prediction type.
        num_inference_steps: as diffusers counts them.

    Raises:
        ValueError: from diffusers, where a sampler cannot do so many steps.
    """
    name, arguments = SAMPLERS[sampler]
    scheduler = getattr(diffusers, name).from_config(model_config, **arguments)
    scheduler.set_timesteps(num_inference_steps)
    return scheduler

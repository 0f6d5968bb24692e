"""Building diffusers' schedulers, unmodified, for the samplers' names."""

import inspect
from functools import lru_cache
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.schedulers import AysSchedules

from sdbatch.engine.cuda import moved
from sdbatch.samplers import AYS, split

# What a model's configuration says of its training. The rest of it, such as Karras' sigmas, is how
# somebody liked to sample, which here the sampler's name says alone.
_TRAINING = (
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "num_train_timesteps",
    "prediction_type",
    "rescale_betas_zero_snr",
    "timestep_spacing",
    "steps_offset",
    "set_alpha_to_one",
)


def make_scheduler(sampler: str, model_config: dict[str, Any], num_inference_steps: int) -> Any:
    """Build the diffusers scheduler of `sampler` with its timesteps set.

    Args:
        sampler: one of samplers.NAMES.
        model_config: the scheduler config that came with the model; only _TRAINING of it counts.
        num_inference_steps: as diffusers counts them.

    Raises:
        ValueError: the sampler cannot do so many steps, or not for this model.
    """
    chosen, schedule = split(sampler)
    kind = getattr(diffusers, chosen.scheduler)
    if model_config.get("rescale_betas_zero_snr") and not _knows(kind, "rescale_betas_zero_snr"):
        raise ValueError(
            f"sampler = {sampler!r}: cannot draw with a model of zero terminal SNR. "
            f"Take euler, dpmpp_2m, unipc or ddim."
        )
    arguments = dict(chosen.arguments)
    if schedule not in (None, AYS):
        arguments[f"use_{schedule}_sigmas"] = True
    training = {name: model_config[name] for name in _TRAINING if name in model_config}
    scheduler = kind.from_config(training, **arguments)
    most = scheduler.config.get("original_inference_steps", num_inference_steps)
    if num_inference_steps > most:  # diffusers speaks of a strength, which nobody here has set
        raise ValueError(
            f"num_inference_steps = {num_inference_steps}: {sampler} takes {most} at most"
        )
    if schedule == AYS:
        alphas = scheduler.alphas_cumprod.double().numpy()
        scheduler.set_timesteps(timesteps=_align_your_steps(alphas, num_inference_steps))
    else:
        scheduler.set_timesteps(num_inference_steps)
    if hasattr(scheduler, "set_begin_index"):  # else it looks for its first timestep, by value, and
        scheduler.set_begin_index(0)  # takes the second where rounding made two of it
    return scheduler


def takes(scheduler: Any, argument: str) -> bool:
    """Tell whether the scheduler's step takes `argument`: "generator", "eta"."""
    return argument in _parameters(type(scheduler).step)


def _knows(kind: Any, argument: str) -> bool:
    return argument in _parameters(kind.__init__)


@lru_cache
def _parameters(function: Any) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _align_your_steps(alphas_cumprod: Any, count: int) -> list[int]:
    """Return `count` timesteps, falling: the published ten, or noise levels between theirs.

    Source: Sabour et al. 2024, sec. 5: other counts by interpolating the logarithm of sigma.
    """
    published = np.array(AysSchedules["StableDiffusionTimesteps"])
    if count == len(published):
        return [int(t) for t in published]
    log_sigmas = np.log((1 - alphas_cumprod) / alphas_cumprod) / 2  # rises with the timestep
    wanted = np.interp(
        np.linspace(0, 1, count), np.linspace(0, 1, len(published)), log_sigmas[published]
    )
    timesteps = np.rint(np.interp(wanted, log_sigmas, np.arange(len(log_sigmas)))).astype(int)
    if len(set(timesteps)) < count:
        raise ValueError(f"num_inference_steps = {count}: too many for an ays schedule")
    return [int(t) for t in timesteps]


def brownian(scheduler: Any, seeds: list[int], latents: torch.Tensor, device: torch.device) -> Any:
    """Return a noise sampler for DPMSolverSDEScheduler: a Brownian tree a seed, on the CPU.

    As that scheduler makes its own at its first step, but with a seed for each image and with the
    CPU's numbers on every device.
    """
    from diffusers.schedulers.scheduling_dpmsolver_sde import BrownianTreeNoiseSampler

    sigmas = scheduler.sigmas
    low, high = sigmas[sigmas > 0].min().item(), sigmas.max().item()
    noise = BrownianTreeNoiseSampler(latents, low, high, seeds)
    return lambda sigma, following: moved(noise(sigma, following), device)

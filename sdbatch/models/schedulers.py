"""diffusers' schedulers, unmodified, behind the engine's interface, by the samplers' names.

For models that were trained on discrete noise levels (Ho et al. 2020): Stable Diffusion 1.x, XL.
"""

import copy
import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import diffusers
import numpy as np
import torch
from diffusers.schedulers import AysSchedules
from numpy.typing import NDArray

from sdbatch.engine.cuda import moved
from sdbatch.engine.request import Request
from sdbatch.models.brownian import Background, NoiseSampler, Query, noise_queries
from sdbatch.models.host_scalars import HostScalars
from sdbatch.samplers import AYS, CONVERTED, TRAILING, split

# The keys of a model's configuration that describe its training. The others, such as Karras'
# sigmas, describe how to sample, which here only the sampler's name decides.
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
    "original_inference_steps",  # of the distillation of an LCM
)


_LMS_ORDER = 4  # diffusers' own
CACHED = 256  # schedulers kept ready: some take 0.1 s to set up


def make_scheduler(sampler: str, model_config: dict[str, Any], num_inference_steps: int) -> Any:
    """Build the diffusers scheduler of `sampler` with its timesteps set.

    Args:
        sampler: one of samplers.NAMES.
        model_config: the scheduler config of the model; only its keys in _TRAINING count.
        num_inference_steps: as diffusers counts them.

    Raises:
        ValueError: the sampler cannot take that many steps, or does not fit this model.
    """
    entry, schedule = split(sampler)
    kind = getattr(diffusers, entry.scheduler)
    if model_config.get("rescale_betas_zero_snr") and not _accepts(
        kind.__init__, "rescale_betas_zero_snr"
    ):
        raise ValueError(
            f"sampler = {sampler!r}: does not work with a model of zero terminal SNR. "
            f"Use euler, dpmpp_2m, unipc or ddim"
        )
    arguments = dict(entry.arguments)
    if schedule in CONVERTED:
        arguments[f"use_{schedule}_sigmas"] = True
    if schedule == TRAILING:
        arguments["timestep_spacing"] = "trailing"
    for name in _TRAINING:
        if name in model_config and _accepts(kind.__init__, name):
            arguments.setdefault(name, model_config[name])
    scheduler = kind(**arguments)  # not from_config, which imports all schedulers and scipy.stats
    most = scheduler.config.get("original_inference_steps", num_inference_steps)
    if num_inference_steps > most:  # diffusers' own message is about a strength
        raise ValueError(
            f"num_inference_steps = {num_inference_steps}: {sampler} takes at most {most}"
        )
    if schedule == AYS:
        alphas = scheduler.alphas_cumprod.double().numpy()
        scheduler.set_timesteps(timesteps=_align_your_steps(alphas, num_inference_steps))
    else:
        scheduler.set_timesteps(num_inference_steps)
    # or diffusers searches the first timestep by value, and takes the second of two equal ones
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    return scheduler


class Kind(NamedTuple):
    """What decides a scheduler's calls."""

    sampler: str  # one of samplers.NAMES
    num_inference_steps: int  # of the whole schedule
    first_step: int  # that is drawn; the earlier ones are left out


class _Ready(NamedTuple):
    """A scheduler at its first call."""

    scheduler: Any
    timesteps: torch.Tensor  # (ticks,), of its calls from the first step on
    sigmas: NDArray[np.float64]  # (ticks,), the noise level of each


class SchedulerCache:
    """Fresh diffusers schedulers by kind, copied from ones that were set up once.

    Args:
        model_config: the scheduler config of the model.
        device: of the latents.
    """

    def __init__(self, model_config: dict[str, Any], device: torch.device) -> None:
        self.device = device
        self._config = model_config
        self._ready: dict[Kind, _Ready] = {}
        self._background = Background()
        self._noise_queries = lru_cache(CACHED)(self._find_noise_queries)

    def make(self, kind: Kind) -> tuple[Any, torch.Tensor]:
        """Return a scheduler at its first call, and the timesteps of its calls, (ticks,).

        Raises ValueError as make_scheduler does, or if the sampler cannot begin in the middle.
        """
        ready = self._get(kind)
        return copy.deepcopy(ready.scheduler), ready.timesteps

    def draw_ahead(self, noise: NoiseSampler, kind: Kind) -> None:
        """Have the noise of a scheduler of the kind drawn in a thread, a step ahead."""
        noise.draw_ahead(self._noise_queries(kind), self._background)

    def sigmas(self, kind: Kind) -> NDArray[np.float64]:
        """Return the noise level of each denoiser call of a request of the kind, (ticks,)."""
        return self._get(kind).sigmas

    def _find_noise_queries(self, kind: Kind) -> list[Query]:
        ready = self._get(kind)
        return noise_queries(ready.scheduler, ready.timesteps)

    def _get(self, kind: Kind) -> _Ready:
        if kind not in self._ready:
            if len(self._ready) >= CACHED:
                self._ready.pop(next(iter(self._ready)))
            self._ready[kind] = self._set_up(kind)
        return self._ready[kind]

    def _set_up(self, kind: Kind) -> _Ready:
        scheduler = make_scheduler(kind.sampler, self._config, kind.num_inference_steps)
        first = kind.first_step * scheduler.order  # as diffusers' image-to-image pipeline counts
        if first and hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first)
        timesteps = scheduler.timesteps[first:]
        sigmas = [_sigma(scheduler.alphas_cumprod, timestep) for timestep in timesteps.tolist()]
        return _Ready(scheduler, timesteps, np.array(sigmas))


class DiffusersScheduler:
    """A diffusers scheduler that steps a cohort; see engine.family.Scheduler.

    Args:
        schedulers: makes the fresh one.
        kind: of the requests.
        requests: of the cohort, n.
        noise: (n, C, h, w) on the CPU.
        generators: of the requests; a sampler that adds noise draws from them.
    """

    def __init__(
        self,
        schedulers: SchedulerCache,
        kind: Kind,
        requests: Sequence[Request],
        noise: torch.Tensor,
        generators: list[torch.Generator],
    ) -> None:
        scheduler, self._on_host = schedulers.make(kind)
        self._scheduler = scheduler
        self._device = device = schedulers.device
        self._arguments: dict[str, Any] = {}
        # LMS weighs its last answers. From a picture on, diffusers takes the weights of more
        # answers than there are; k-diffusion's `sample_lms` and AUTOMATIC1111 do not.
        self._takes_order = _accepts(type(scheduler).step, "order")
        if _accepts(type(scheduler).step, "generator"):
            self._arguments["generator"] = generators
        if _accepts(type(scheduler).step, "eta"):
            self._arguments["eta"] = requests[0].eta
        if hasattr(scheduler, "noise_sampler_seed"):
            seeds = [request.seed for request in requests]
            sampler = NoiseSampler(scheduler.sigmas, seeds, noise.shape[1:], device)
            if device.type != "cpu":  # where torch needs the cores itself
                schedulers.draw_ahead(sampler, kind)
            scheduler.noise_sampler = sampler
        self.timesteps = moved(self._on_host.float(), device)

    def start(self, noise: torch.Tensor) -> torch.Tensor:
        """See engine.family.Scheduler."""
        started: torch.Tensor = moved(noise, self._device) * self._scheduler.init_noise_sigma
        return started

    def noised(self, latents: torch.Tensor, noise: torch.Tensor, step: int) -> torch.Tensor:
        """See engine.family.Scheduler."""
        if step == len(self._on_host):
            return latents
        timestep = self._on_host[step : step + 1]
        one, zero = torch.ones(1), torch.zeros(1)
        # as numbers of the host: diffusers' own sum would copy its table and wait for the device
        signal: float = self._scheduler.add_noise(one, zero, timestep).item()
        deviation: float = self._scheduler.add_noise(zero, one, timestep).item()
        return signal * latents + deviation * noise

    def model_input(self, latents: torch.Tensor, step: int) -> torch.Tensor:
        """See engine.family.Scheduler."""
        scaled: torch.Tensor = self._scheduler.scale_model_input(latents, self._timestep(step))
        return scaled

    def step(self, answer: torch.Tensor, step: int, latents: torch.Tensor) -> torch.Tensor:
        """See engine.family.Scheduler."""
        if self._takes_order:
            self._arguments["order"] = min(step + 1, _LMS_ORDER)
        with self._without_waits():
            stepped: torch.Tensor = self._scheduler.step(
                answer, self._timestep(step), latents, return_dict=False, **self._arguments
            )[0]
        return stepped

    def clean(self, model_input: torch.Tensor, answer: torch.Tensor, step: int) -> torch.Tensor:
        """See engine.family.Scheduler.

        The denoiser sees x = sqrt(a) x0 + sqrt(1 - a) noise, however the sampler scales its own
        latents (Ho et al. 2020, eq. 4; for velocities Salimans and Ho 2022, sec. 2.4).
        """
        signal, noise = self._shares(step)
        if self._scheduler.config.prediction_type == "v_prediction":
            clean: torch.Tensor = signal * model_input - noise * answer
        else:
            clean = (model_input - noise * answer) / signal
        return clean

    def answer(self, model_input: torch.Tensor, clean: torch.Tensor, step: int) -> torch.Tensor:
        """See engine.family.Scheduler."""
        signal, noise = self._shares(step)
        if self._scheduler.config.prediction_type == "v_prediction":
            answer: torch.Tensor = (signal * model_input - clean) / noise
        else:
            answer = (model_input - signal * clean) / noise
        return answer

    def _shares(self, step: int) -> tuple[float, float]:
        """Return what signal and noise are multiplied by in the denoiser's input at a step."""
        sigma = _sigma(self._scheduler.alphas_cumprod, float(self._timestep(step)))
        alpha = 1 / (1 + sigma**2)
        return alpha**0.5, (1 - alpha) ** 0.5

    def _without_waits(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._device.type == "cpu" else HostScalars(self._device)

    def _timestep(self, step: int) -> torch.Tensor:
        return self._on_host[step]


def _sigma(alphas: torch.Tensor, timestep: float) -> float:
    """Return the noise by the signal at a timestep; between two, diffusers interpolates sigmas."""
    low = int(timestep)
    part, high = timestep - low, min(low + 1, len(alphas) - 1)
    below, above = (max(float(alphas[at]), 1e-4) for at in (low, high))
    return float((1 - part) * (1 / below - 1) ** 0.5 + part * (1 / above - 1) ** 0.5)


def _accepts(function: Any, argument: str) -> bool:
    return argument in _parameters(function)


@lru_cache
def _parameters(function: Any) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _align_your_steps(alphas_cumprod: Any, count: int) -> list[int]:
    """Return `count` timesteps, falling: the published ten, or interpolated noise levels.

    Source: Sabour et al. 2024, sec. 5: other counts by interpolating the logarithm of sigma.
    """
    published = np.array(AysSchedules["StableDiffusionTimesteps"])
    if count == len(published):
        return [int(t) for t in published]
    log_sigmas = np.log((1 - alphas_cumprod) / alphas_cumprod) / 2  # rises with the timestep
    log_levels = np.interp(
        np.linspace(0, 1, count), np.linspace(0, 1, len(published)), log_sigmas[published]
    )
    timesteps = np.rint(np.interp(log_levels, log_sigmas, np.arange(len(log_sigmas)))).astype(int)
    if len(set(timesteps)) < count:
        raise ValueError(f"num_inference_steps = {count}: too many for an ays schedule")
    return [int(t) for t in timesteps]

"""A cohort: requests that step together, and the diffusers scheduler that steps them.

n = requests of the cohort, C = 4 latent channels, h/w = latent height/width,
L = text tokens, D = text width.
"""

import traceback
from collections.abc import Iterable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sdbatch.engine.cuda import moved
from sdbatch.engine.request import Drawn, Follow, Request
from sdbatch.models.schedulers import brownian, takes
from sdbatch.models.sd1.family import Prompts, StableDiffusion1, initial_noise


@dataclass(slots=True, eq=False)
class Ticket:
    """A request on its way through the engine."""

    request: Request
    prompts: Prompts
    exact: bool = True  # never drawn in fewer lanes than the engine has
    follow: Follow | None = None
    future: Future[Drawn] = field(default_factory=Future)
    ticks: int = 0  # UNet calls that its sampler makes
    overtaken_at: int = 0  # admissions after which it goes first
    alone: bool = False  # its cohort failed: drawn again by itself, to find whose fault it was
    fewest: int = 0  # lanes of the UNet calls so far
    settled: bool = False

    def settle(self, outcome: Drawn | Exception) -> None:
        """End the future with `outcome`, once; one that was cancelled stays so."""
        if self.settled:
            return
        self.settled = True
        try:
            if not self.future.set_running_or_notify_cancel():
                return
            if isinstance(outcome, Drawn):
                self.future.set_result(outcome)
            else:
                # without its frames, whose tensors would live as long as the future
                self.future.set_exception(outcome.with_traceback(None))
        except BaseException:  # noqa: BLE001  of a caller's callback, and so not the engine's end
            traceback.print_exc()

    def lanes(self) -> NDArray[np.int64]:
        """Return the lanes that it takes, tick by tick."""
        start, stop = self.request.guided_ticks(self.ticks)
        lanes = np.ones(self.ticks, np.int64)
        lanes[start:stop] = 2
        return lanes


class Cohort:
    """Requests of one kind on their way from noise to latents, one timestep at a time.

    Its lanes are the rows it needs in a UNet call: for each request one with the prompt, and for
    one that is guided at this step another with the negative prompt.
    """

    def __init__(
        self,
        tickets: Sequence[Ticket],
        sd: StableDiffusion1,
        scheduler: Any,
        waiting: Iterable[Ticket] = (),
    ) -> None:
        self.tickets = list(tickets)
        self._scheduler = scheduler
        self.step = 0
        self.seen: list[tuple[Ticket, torch.Tensor]] = []  # previews (C, h, w) of the last tick
        self._dropped: set[int] = set()
        requests = [ticket.request for ticket in tickets]
        self._windows = [request.guided_ticks(len(scheduler.timesteps)) for request in requests]
        generators = [torch.Generator().manual_seed(request.seed) for request in requests]
        noise = torch.stack(
            [
                initial_noise(generator, request.height, request.width)
                for generator, request in zip(generators, requests, strict=True)
            ]
        )
        self.latents = moved(noise, sd.device) * scheduler.init_noise_sigma  # (n, C, h, w)
        self._arguments: dict[str, Any] = {}
        if takes(scheduler, "generator"):
            self._arguments["generator"] = generators
        if takes(scheduler, "eta"):
            self._arguments["eta"] = requests[0].eta
        if hasattr(scheduler, "noise_sampler_seed"):
            seeds = [request.seed for request in requests]
            scheduler.noise_sampler = brownian(scheduler, seeds, noise, sd.device)
        self._timesteps = moved(scheduler.timesteps.float(), sd.device)
        self._prompts, self._negatives = sd.embed(
            [ticket.prompts for ticket in tickets], (ticket.prompts for ticket in waiting)
        )
        self._group()

    @property
    def done(self) -> bool:
        """Tell whether the latents are finished."""
        return self.step == len(self._scheduler.timesteps)

    @property
    def alive(self) -> list[int]:
        """Return the numbers of the requests that were not dropped."""
        return [i for i in range(len(self.tickets)) if i not in self._dropped]

    @property
    def lanes(self) -> int:
        """Return how many rows of the next UNet call the cohort takes."""
        return len(self.context)

    def plan(self) -> NDArray[np.int64]:
        """Return the lanes that the cohort takes, from its next tick to its last."""
        lanes = np.zeros(len(self._timesteps), np.int64)
        for i in self.alive:
            lanes += self.tickets[i].lanes()
        return lanes[self.step :]

    def drop_cancelled(self) -> bool:
        """Give up the lanes of requests that were cancelled; tell whether there were any.

        Their latents stay where they are, as the scheduler remembers them by place.
        """
        cancelled = {i for i in self.alive if self.tickets[i].future.cancelled()}
        for i in cancelled:
            self.tickets[i].settle(CancelledError())
        self._dropped |= cancelled
        if cancelled and self.alive:
            self._group()
        return bool(cancelled)

    def model_input(self) -> torch.Tensor:
        """Return what the cohort's lanes put into the UNet: (lanes, C, h, w) in float32."""
        scaled = self._scheduler.scale_model_input(self.latents, self._timestep)
        self._scaled = scaled
        if self._whole:
            return torch.cat([scaled, scaled]) if len(self._guided) else scaled
        return torch.cat([scaled[self._rows], scaled[self._guided]])

    def timesteps(self) -> torch.Tensor:
        """Return the lanes' timesteps, (lanes,), on the device."""
        timestep: torch.Tensor = self._timesteps[self.step]
        return timestep.expand(self.lanes)

    def advance(self, noise: torch.Tensor) -> None:
        """Step all requests with the UNet's answer, (lanes, C, h, w)."""
        noise = noise.float()
        prompted, negative = noise[: len(self._rows)], noise[len(self._rows) :]
        if len(negative):
            prompted = self._guide(prompted, negative)
        if self._dropped:
            prompted = torch.zeros_like(self.latents).index_copy(0, self._rows, prompted)
        self._look(prompted)
        self.latents = self._scheduler.step(
            prompted, self._timestep, self.latents, return_dict=False, **self._arguments
        )[0]
        self.step += 1
        if not self.done and any(self.step in window for window in self._windows):
            self._group()

    def _look(self, answers: torch.Tensor) -> None:
        """Keep what the images of which a preview is due would be if they ended here.

        The UNet sees x = sqrt(a) x0 + sqrt(1 - a) noise, whichever way the sampler scales its own
        latents (Ho et al. 2020, eq. 4; for what a velocity is Salimans and Ho 2022, sec. 2.4).
        """
        tick, ticks = self.step + 1, len(self._timesteps)
        self.seen = []
        for i in self.alive:
            follow = self.tickets[i].follow
            if follow is None or not follow.is_due(tick, ticks):
                continue
            alpha = _signal(self._scheduler.alphas_cumprod, float(self._timestep))
            root, noise = alpha**0.5, (1 - alpha) ** 0.5
            if self._scheduler.config.prediction_type == "v_prediction":
                image = root * self._scaled[i] - noise * answers[i]
            else:
                image = (self._scaled[i] - noise * answers[i]) / root
            self.seen.append((self.tickets[i], image))

    @property
    def _timestep(self) -> torch.Tensor:
        return self._scheduler.timesteps[self.step]  # type: ignore[no-any-return]

    def _group(self) -> None:
        """Find out which requests take lanes now, and which of them two."""
        alive = self.alive
        guided = [i for i in alive if self._windows[i][0] <= self.step < self._windows[i][1]]
        requests = [self.tickets[i].request for i in guided]
        device = self.latents.device
        self._whole = len(alive) == len(self.tickets) and len(guided) in (0, len(alive))
        self._rows = moved(torch.tensor(alive), device)
        self._guided = moved(torch.tensor(guided, dtype=torch.int64), device)
        among = [alive.index(i) for i in guided]  # the prompted
        self._among = moved(torch.tensor(among, dtype=torch.int64), device)
        scales = torch.tensor([request.guidance_scale for request in requests])
        self._scales = moved(scales, device).view(-1, 1, 1, 1)
        self._rescales = [request.guidance_rescale for request in requests]
        self.context = torch.cat([self._prompts[self._rows], self._negatives[self._guided]])

    def _guide(self, prompted: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
        """Guide as Ho and Salimans 2022 do, in the form of Saharia et al. 2022 (Imagen), eq. 2."""
        text = prompted if self._whole else prompted[self._among]
        guided = negative + self._scales * (text - negative)
        for i, rescale in enumerate(self._rescales):
            if rescale:  # image by image: a sum's order could depend on how many there are
                guided[i] = _rescaled(guided[i], text[i], rescale)
        return guided if self._whole else prompted.index_copy(0, self._among, guided)


def _signal(alphas: torch.Tensor, timestep: float) -> float:
    """Return the part of signal at a timestep; between two, diffusers mixes their sigmas."""
    low = int(timestep)
    part, high = timestep - low, min(low + 1, len(alphas) - 1)
    below, above = (max(float(alphas[at]), 1e-4) for at in (low, high))
    sigma = (1 - part) * (1 / below - 1) ** 0.5 + part * (1 / above - 1) ** 0.5
    return 1 / (1 + float(sigma) ** 2)


def _rescaled(guided: torch.Tensor, text: torch.Tensor, rescale: float) -> torch.Tensor:
    """Give the guided answer the spread of the prompted one (Lin et al. 2023, sec. 3.4)."""
    return rescale * (guided * (text.std() / guided.std())) + (1 - rescale) * guided

"""A cohort: requests that step together, with one scheduler.

n = requests of the cohort, C = latent channels, h/w = latent height/width.
"""

import traceback
from collections.abc import Iterable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray

from sdbatch.engine.clock import Account
from sdbatch.engine.cuda import moved
from sdbatch.engine.family import Cache, Conditions, Family, Original, Reading
from sdbatch.engine.noise import start_noise
from sdbatch.engine.painting import Painting
from sdbatch.engine.request import Drawn, Follow, Request


@dataclass(slots=True, eq=False)
class Ticket:
    """A request on its way through the engine."""

    request: Request
    reading: Reading
    exact: bool = True  # always drawn in the engine's full number of lanes
    follow: Follow | None = None
    account: Account = field(default_factory=Account)  # of its shape
    future: Future[Drawn] = field(default_factory=Future)
    sigmas: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))  # of denoiser calls
    original: Original | None = None  # what its latents begin with and keep
    ticks_before: int = 0  # of the first pass, in the second pass of hires fix
    ticks_after: int = 0  # of the second pass, in the first
    rows_before: int = 0  # rows of the smallest denoiser call of the first pass
    full_before: bool = True  # those of the first pass had the engine's full number of rows
    overdue_at: int = 0  # admissions after which it goes first
    alone: bool = False  # its cohort failed: drawn again by itself, to find which request failed
    suspect: bool = False  # a call over all lanes failed: drawn again with no other in the lanes
    fewest_rows: int = 0  # rows of the smallest denoiser call so far, of this pass
    previewed: int = 0  # the tick of the last preview that its follower got
    settled: bool = False

    def settle(self, outcome: Drawn | Exception) -> None:
        """End the future with `outcome`, once; a cancelled future stays cancelled."""
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
        except BaseException:  # noqa: BLE001  from a caller's callback: it must not end the engine
            traceback.print_exc()

    @property
    def kind(self) -> tuple[str, int, float, bytes]:
        """Return what requests of one shape must have in common to step together."""
        request = self.request
        return (
            request.sampler,
            request.num_inference_steps,
            request.eta,
            self.sigmas.tobytes(),
        )

    @property
    def ticks(self) -> int:
        """Return how many denoiser calls its sampler makes."""
        return len(self.sigmas)

    def guided(self) -> NDArray[np.bool_]:
        """Return in which ticks it is guided, (ticks,)."""
        return self.request.guided_ticks(self.sigmas)

    def lanes(self) -> NDArray[np.int64]:
        """Return the lanes that it takes, tick by tick."""
        return np.where(self.guided(), self.reading.lanes, 1)

    def progress(self, tick: int) -> tuple[int, int]:
        """Return the ticks of both passes that are done after a tick of this one, and all."""
        return self.ticks_before + tick, self.ticks_before + self.ticks + self.ticks_after

    def begin_second_pass(self, *, full: bool) -> None:
        """Become the second pass of hires fix, without its original yet.

        Args:
            full: whether the first pass was drawn in the engine's full number of rows throughout.
        """
        enlarged = self.request.enlarged()
        assert enlarged is not None, "the request has a second pass"
        self.ticks_before, self.ticks_after = self.ticks, 0
        self.rows_before, self.full_before = self.fewest_rows, full
        self.fewest_rows = 0
        self.request, self.original = enlarged, None

    @property
    def begins_with_noise(self) -> bool:
        """Tell whether its first latents are noise alone."""
        return self.original is None or not self.original.starts


class Cohort:
    """Requests of one kind on their way from noise to latents, one timestep at a time.

    Its lanes are the rows it needs in a denoiser call: one with the prompt for each request,
    another with the negative prompt for each request that is guided at this step, and a third for
    those of them whose picture guides too.
    """

    def __init__(
        self, tickets: Sequence[Ticket], family: Family, waiting: Iterable[Ticket] = ()
    ) -> None:
        self.tickets = list(tickets)
        self.step = 0
        self.cache_interval = tickets[0].request.cache_interval
        self.cache: Cache = {}  # of its lanes; the next denoiser call reuses it
        self.previews: list[tuple[Ticket, torch.Tensor]] = []  # latents (C, h, w) of the last tick
        self._family = family
        self._dropped: set[int] = set()
        requests = [ticket.request for ticket in tickets]
        generators = [torch.Generator().manual_seed(request.seed) for request in requests]
        noise = torch.stack(
            [
                start_noise(family, request, generator)
                for request, generator in zip(requests, generators, strict=True)
            ]
        )
        self._scheduler = family.scheduler(requests, noise, generators)
        self._timesteps = self._scheduler.timesteps
        self._guided_ticks = np.stack([ticket.guided() for ticket in tickets])  # (n, ticks)
        self._painting = Painting(self.tickets, noise, self._scheduler)
        self.latents = self._painting.begin(self._scheduler.start(noise))  # (n, C, h, w)
        self._readings = [ticket.reading.at(0) for ticket in tickets]
        changing = [i for i, now in enumerate(self._readings) if now != tickets[i].reading]
        later = chain((tickets[i] for i in changing), waiting)
        self._embed(ticket.reading for ticket in later)
        self._group()

    @property
    def done(self) -> bool:
        """Tell whether the latents are finished."""
        return self.step == len(self._timesteps)

    @property
    def alive(self) -> list[int]:
        """Return the numbers of the requests that were not dropped."""
        return [i for i in range(len(self.tickets)) if i not in self._dropped]

    @property
    def lanes(self) -> int:
        """Return how many rows of the next denoiser call the cohort takes."""
        return len(self.first_lanes)

    def lanes_ahead(self) -> NDArray[np.int64]:
        """Return the lanes that the cohort takes, from its next tick to its last."""
        lanes = np.zeros(len(self._timesteps), np.int64)
        for i in self.alive:
            lanes += self.tickets[i].lanes()
        return lanes[self.step :]

    def drop_cancelled(self) -> bool:
        """Release the lanes of cancelled requests; tell whether there were any.

        Their latents stay in place, as the scheduler keeps its state by index.
        """
        cancelled = {i for i in self.alive if self.tickets[i].future.cancelled()}
        for i in cancelled:
            self.tickets[i].settle(CancelledError())
        self._dropped |= cancelled
        if cancelled and self.alive:
            self._group()
        return bool(cancelled)

    def model_input(self) -> torch.Tensor:
        """Return the input of the cohort's lanes to the denoiser: (lanes, C, h, w) in float32."""
        scaled = self._scheduler.model_input(self.latents, self.step)
        self._scaled = scaled
        if self._whole:
            return torch.cat([scaled, scaled]) if len(self._guided) else scaled
        return torch.cat([scaled[rows] for rows in (self._rows, self._guided, self._third)])

    def timesteps(self) -> torch.Tensor:
        """Return the lanes' timesteps, (lanes,), on the device."""
        return self._timesteps[self.step].expand(self.lanes)

    def advance(self, answer: torch.Tensor) -> None:
        """Step all requests with the denoiser's answer, (lanes, C, h, w)."""
        sizes = [len(rows) for rows in (self._rows, self._guided, self._third)]
        prompted, negative, third = torch.split(answer.float(), sizes)
        if len(negative):
            prompted = self._guide(prompted, negative, third)
        if self._dropped:
            prompted = torch.zeros_like(self.latents).index_copy(0, self._rows, prompted)
        prompted = self._painting.blend_answers(prompted, self._scaled, self.step)
        self._keep_previews(prompted)
        self.latents = self._scheduler.step(prompted, self.step, self.latents)
        self.step += 1
        self.latents = self._painting.restore(self.latents, self.step)
        if self.step % self.cache_interval == 0:
            self.cache = {}
        if not self.done:
            self._prepare_tick()

    def _prepare_tick(self) -> None:
        """Group the lanes again if the next tick has others, or other conditions."""
        changed = (self._guided_ticks[:, self.step - 1] != self._guided_ticks[:, self.step]).any()
        if not self.cache:
            readings = [ticket.reading.at(self.step) for ticket in self.tickets]
            if readings != self._readings:
                self._readings, changed = readings, True
                self._embed(())
        if changed:
            self._group()

    def _embed(self, soon: Iterable[Reading]) -> None:
        """Embed what is drawn now: the conditions of an image's lanes, n of each."""
        self._prompts, self._negatives, *self._thirds = self._family.embed(self._readings, soon)

    def _keep_previews(self, answers: torch.Tensor) -> None:
        """Keep the noise-free latents of the images that have a preview due."""
        self.previews = []
        for i in self.alive:
            follow = self.tickets[i].follow
            if follow is not None and follow.is_due(*self.tickets[i].progress(self.step + 1)):
                clean = self._scheduler.clean(self._scaled[i], answers[i], self.step)
                self.previews.append((self.tickets[i], clean))

    def _group(self) -> None:
        """Determine which requests take lanes now, and which of them take more than one."""
        alive = self.alive
        guided = [i for i in alive if self._guided_ticks[i, self.step]]
        third = [i for i in guided if self.tickets[i].reading.lanes > 2]
        requests = [self.tickets[i].request for i in guided]
        device = self.latents.device
        all_alike = len(alive) == len(self.tickets) and len(guided) in (0, len(alive))
        self._whole = all_alike and not third
        among = [alive.index(i) for i in guided]  # the prompted
        # of each lane, the first of its image
        self.first_lanes = [*range(len(alive)), *among, *(alive.index(i) for i in third)]
        self._rows, self._guided, self._third, self._among, self._third_among = (
            moved(torch.tensor(each, dtype=torch.int64), device)
            for each in (alive, guided, third, among, [guided.index(i) for i in third])
        )
        scales = torch.tensor([request.guidance_scale for request in requests])
        self._scales = moved(scales, device).view(-1, 1, 1, 1)
        picture_scales = torch.tensor([self.tickets[i].request.image_guidance_scale for i in third])
        self._picture_scales = moved(picture_scales, device).view(-1, 1, 1, 1)
        self._rescales = [request.guidance_rescale for request in requests]
        self.conditions: Conditions = {}
        for name, prompts in self._prompts.items():
            parts = [prompts[self._rows], self._negatives[name][self._guided]]
            if third:
                parts.append(self._thirds[0][name][self._third])
            self.conditions[name] = torch.cat(parts)

    def _guide(
        self, prompted: torch.Tensor, negative: torch.Tensor, third: torch.Tensor
    ) -> torch.Tensor:
        """Guide as Ho and Salimans 2022 do, in the form of Saharia et al. 2022 (Imagen), eq. 2.

        With a third lane as Brooks et al. 2023 (InstructPix2Pix) do, eq. 3.
        """
        text = prompted if self._whole else prompted[self._among]
        guided = negative + self._scales * (text - negative)
        if len(third):
            at = self._third_among
            toward_text = self._scales[at] * (text[at] - negative[at])
            toward_picture = self._picture_scales * (negative[at] - third)
            guided = guided.index_copy(0, at, third + toward_text + toward_picture)
        for i, rescale in enumerate(self._rescales):
            if rescale:  # image by image: the order of a sum could depend on the number of images
                guided[i] = _rescaled(guided[i], text[i], rescale)
        return guided if self._whole else prompted.index_copy(0, self._among, guided)


def _rescaled(guided: torch.Tensor, text: torch.Tensor, rescale: float) -> torch.Tensor:
    """Give the guided answer the standard deviation of the prompted one.

    Source: Lin et al. 2023, sec. 3.4.
    """
    return rescale * (guided * (text.std() / guided.std())) + (1 - rescale) * guided

"""The noise of DPM++ SDE: Brownian motions, one an image, drawn on the CPU for every device.

The numbers are those of torchsde's BrownianInterval, which diffusers' scheduler uses. On a device
other than the CPU a thread draws the noise of the next step while the device computes this one.

n = images, C = latent channels, h/w = latent height/width.
"""

import copy
import math
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np
import torch

from sdbatch.engine.cuda import moved

DIGITS = 6  # to which torchsde rounds the ends of intervals, as diffusers calls it
POOL_SIZE = 24  # of numpy's SeedSequence, as diffusers calls torchsde


class _Interval(NamedTuple):
    start: float
    end: float
    depth: int  # in the tree of halves
    number: int  # within its depth
    increments: torch.Tensor  # (n, C, h, w), of the motions over the interval


class BrownianMotions:
    """The Brownian motions of images between two times, each a function of its seed.

    An interval is halved until its parts fit; the motion of the left half is a normal draw around
    half of the whole. The halves are the same for all images, so all are computed together, and the
    draw of an interval serves both halves. torchsde computes image by image and half by half, with
    the same bits.

    Source: torchsde's `BrownianInterval(halfway_tree=True)`; Kidger et al. 2021, sec. 4.

    Args:
        low, high: the first and the last time.
        seeds: of the images, n.
        shape: of an image's latents, (C, h, w).
    """

    def __init__(self, low: float, high: float, seeds: Sequence[int], shape: Sequence[int]) -> None:
        self._seeds = seeds
        self._shape = (len(seeds), *shape)
        self._generator = torch.Generator()
        whole = self._noise() * math.sqrt(high - low)
        self._whole = _Interval(round(low, DIGITS), round(high, DIGITS), 0, 0, whole)
        # Left halves by depth and number, of this query and the last: the next one begins there.
        self._lefts: dict[tuple[int, int], torch.Tensor] = {}
        self._last_lefts: dict[tuple[int, int], torch.Tensor] = {}

    @torch.inference_mode()
    def increments(self, start: float, end: float) -> torch.Tensor:
        """Return what the motions add from one time to a later one: (n, C, h, w)."""
        self._lefts, self._last_lefts = {}, self._lefts
        start, end = (
            round(min(max(time, self._whole.start), self._whole.end), DIGITS)
            for time in (start, end)
        )
        if start == end:
            return torch.zeros(self._shape)
        parts = self._parts(self._whole, start, end)
        total = next(parts)
        for part in parts:
            total = total + part
        return total

    def _parts(self, whole: _Interval, start: float, end: float) -> Iterator[torch.Tensor]:
        """Yield the increments of the largest halves that make up [start, end], in order."""
        if (whole.start, whole.end) == (start, end):
            yield whole.increments
            return
        left = self._left(whole)
        if start < left.end:
            yield from self._parts(left, start, min(end, left.end))
        if end > left.end:
            increments = whole.increments - left.increments
            right = _Interval(left.end, whole.end, left.depth, left.number + 1, increments)
            yield from self._parts(right, max(start, left.end), end)

    def _left(self, whole: _Interval) -> _Interval:
        middle = round(0.5 * (whole.end + whole.start), DIGITS)
        place = (whole.depth, whole.number)
        increments = self._lefts.get(place, self._last_lefts.get(place))
        if increments is None:
            left, right = middle - whole.start, whole.end - middle
            reciprocal = 1 / (whole.end - whole.start)
            mean = left * whole.increments * reciprocal
            noise = self._noise(whole.number, whole.depth)
            increments = mean + math.sqrt(left * right * reciprocal) * noise
        self._lefts[place] = increments
        return _Interval(whole.start, middle, whole.depth + 1, 2 * whole.number, increments)

    def _noise(self, *place: int) -> torch.Tensor:
        """Draw the unit noise of an interval, (n, C, h, w)."""
        noise = torch.empty(self._shape)
        for image, seed in zip(noise, self._seeds, strict=True):
            sequence = np.random.SeedSequence(seed, spawn_key=place, pool_size=POOL_SIZE)
            own = self._generator.manual_seed(int(sequence.generate_state(1)[0]))
            image.normal_(generator=own)
        return noise


class Background:
    """Makes calls one after another in a thread, which ends when no call waits.

    One thread, as most of the noise's time is spent in Python and single-threaded draws.
    """

    def __init__(self) -> None:
        self._waiting: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._lock = threading.Lock()
        self._running = False

    def submit(self, call: Callable[[], Any]) -> Future[Any]:
        """Queue a call; its future ends with the result or with what it raises."""
        future: Future[Any] = Future()
        with self._lock:
            self._waiting.append((future, call))
            if not self._running:
                self._running = True
                threading.Thread(target=self._run, name="sdbatch-noise").start()
        return future

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._running = False
                    return
                future, call = self._waiting.popleft()
            try:
                future.set_result(call())
            except BaseException as error:  # noqa: BLE001  raised where the result is needed
                future.set_exception(error)


Query = tuple[torch.Tensor, torch.Tensor]  # two noise levels, 0-dimensional


def noise_queries(scheduler: Any, timesteps: torch.Tensor) -> list[Query]:
    """Return the calls of its noise sampler that a fresh DPMSolverSDEScheduler makes, in order."""
    queries: list[Query] = []

    def record(sigma: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
        queries.append((sigma, following))
        return torch.zeros(())

    own = copy.deepcopy(scheduler)
    own.noise_sampler = record
    latents = torch.zeros(1, 1, 1, 1)
    for timestep in timesteps:
        latents = own.step(latents, timestep, latents, return_dict=False)[0]
    return queries


class NoiseSampler:
    """A noise sampler for DPMSolverSDEScheduler: the increments between noise levels, scaled.

    Like the one that the scheduler makes at its first step, but with a seed for each image and the
    CPU's numbers on every device.

    Args:
        sigmas: of the scheduler.
        seeds: of the images, n.
        shape: of an image's latents, (C, h, w).
        device: of the noise.
    """

    def __init__(
        self,
        sigmas: torch.Tensor,
        seeds: Sequence[int],
        shape: Sequence[int],
        device: torch.device,
    ) -> None:
        low, high = sigmas[sigmas > 0].min().item(), sigmas.max().item()
        self._motions = BrownianMotions(low, high, seeds, shape)
        self._device = device
        self._background: Background | None = None
        self._queries: deque[Query] = deque()
        self._next: tuple[Query, Future[torch.Tensor]] | None = None

    def draw_ahead(self, queries: Sequence[Query], background: Background) -> None:
        """Draw the noise of these calls before they come, always one ahead."""
        self._queries, self._background = deque(queries), background
        self._start_next()

    def __call__(self, sigma: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
        """Return the unit noise between two noise levels, (n, C, h, w) on the device."""
        if self._next is None:
            return moved(self._draw(sigma, following), self._device)
        query, future = self._next
        noise = future.result()
        if query != (sigma, following):  # another sequence, so nothing more is known of it
            self._queries.clear()
            noise = self._draw(sigma, following)
        self._start_next()
        return moved(noise, self._device)

    def _start_next(self) -> None:
        self._next = None
        if self._queries and self._background is not None:
            query = self._queries.popleft()
            self._next = (query, self._background.submit(lambda: self._draw(*query)))

    def _draw(self, sigma: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
        start, end, sign = float(sigma), float(following), 1.0
        if not start < end:
            start, end, sign = end, start, -1.0
        increments = self._motions.increments(start, end) * sign
        return increments / (following - sigma).abs().sqrt()

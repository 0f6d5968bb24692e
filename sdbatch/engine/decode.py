"""From finished latents to delivered images: decoding in fixed groups, copies, futures.

The engine's thread decodes, as it owns the device. A second thread waits for the copies off the
device and settles the futures, so that no tick waits for them.
"""

import math
import queue
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch

from sdbatch.engine import cuda
from sdbatch.engine.cohort import Cohort, Ticket
from sdbatch.engine.family import Family
from sdbatch.engine.faults import FaultPolicy
from sdbatch.engine.lanes import padded
from sdbatch.engine.request import Drawn

GROUP = 4  # images in a decoder call at most: always the same number, padded
MAX_IDLE_SIZES = 64  # image sizes that are kept while no image of them waits
MAX_ROUNDS = 8  # that a finished image waits for others to fill its group


class SafetyChecker(Protocol):
    """Scores pictures by concept."""

    def scores(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the scores, (n, concepts), of pictures (n, H, W, 3) uint8; above 0 is flagged."""


@dataclass(frozen=True, slots=True)
class _Pictures:
    """Decoded images, still on the device."""

    pixels: torch.Tensor  # (n, H, W, 3) uint8
    finite: torch.Tensor  # (n,) bool: False where the latents were not
    scores: torch.Tensor | None  # (n, concepts) of the safety checker


@dataclass(slots=True)
class _Finished:
    ticket: Ticket
    latents: torch.Tensor  # (C, h, w)
    exact: bool  # every denoiser call had the engine's full number of rows


@dataclass(slots=True)
class _Waiting:
    """Finished images of one size that wait for a full group."""

    group: int
    images: list[_Finished] = field(default_factory=list)
    rounds: int = 0  # that the first of them has waited


class Decoder:
    """Decodes and delivers. All but its delivering thread belongs to the engine's thread.

    Args:
        family: decodes.
        checker: scores what was decoded, if there is one.
        faults: handles what a decoder call raises.
        lanes_of: the lanes for images of a height and width. Few lanes mean large images or little
            memory, so the groups are smaller too.
    """

    def __init__(
        self,
        family: Family,
        checker: SafetyChecker | None,
        faults: FaultPolicy,
        lanes_of: Callable[[int, int], int],
    ) -> None:
        self._family = family
        self._checker = checker
        self._faults = faults
        self._lanes_of = lanes_of
        self._sizes: dict[tuple[int, int], _Waiting] = {}
        self._deliveries: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._deliver, name="sdbatch-deliver", daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Tell whether images wait to be decoded."""
        return any(size.images for size in self._sizes.values())

    @property
    def alive(self) -> bool:
        """Tell whether the delivering thread runs."""
        return self._thread.is_alive()

    def add(self, ticket: Ticket, latents: torch.Tensor) -> None:
        """Queue a request's finished latents (C, h, w) for a group."""
        key = (ticket.request.height, ticket.request.width)
        size = self._sizes.setdefault(key, _Waiting(self._group_of(ticket)))
        if len(self._sizes) > MAX_IDLE_SIZES:
            self._sizes = {key: each for key, each in self._sizes.items() if each.images}
            self._sizes[key] = size
        exact = ticket.fewest_rows == self._lanes_for(ticket)
        size.images.append(_Finished(ticket, latents, exact))

    def report(self, cohort: Cohort) -> None:
        """Report the progress of a cohort to its followers, with the previews that are due.

        A preview that there is no memory for is left out.
        """
        for i in cohort.alive:
            ticket = cohort.tickets[i]
            if ticket.follow is not None:
                step = partial(ticket.follow.step, cohort.step, ticket.ticks)
                self._deliveries.put(partial(_call, step))
        for ticket, latents in cohort.previews:
            pictures = self._faults.decode(partial(self._pictures, [latents], 1))
            if isinstance(pictures, Exception):
                self._faults.record("no preview", pictures)
            else:
                self._deliveries.put(_Copy([_Finished(ticket, latents, False)], pictures).show)

    def decode(self, *, hurry: bool) -> None:
        """Decode the full groups; if `hurry` or after MAX_ROUNDS also those that are not full."""
        for size in self._sizes.values():
            size.rounds += bool(size.images)
            while len(size.images) >= size.group or (
                size.images and (hurry or size.rounds > MAX_ROUNDS)
            ):
                size.rounds = 0
                group, size.images = size.images[: size.group], size.images[size.group :]
                self._decode(group, size)

    def close(self) -> None:
        """Deliver what was decoded, then stop."""
        self._deliveries.put(None)
        self._thread.join()

    def _group_of(self, ticket: Ticket) -> int:
        return max(1, min(GROUP, self._lanes_for(ticket) // 2))

    def _lanes_for(self, ticket: Ticket) -> int:
        return self._lanes_of(ticket.request.height, ticket.request.width)

    def _decode(self, group: list[_Finished], size: _Waiting) -> None:
        latents = [image.latents for image in group]
        count = size.group
        if not any(image.ticket.exact for image in group):
            count = min(count, 1 << (len(group) - 1).bit_length())
        pictures = self._faults.decode(partial(self._pictures, latents, count))
        if isinstance(pictures, _Pictures):
            for image in group:
                image.exact &= count == self._group_of(image.ticket)
            self._deliveries.put(_Copy(group, pictures).deliver)
        elif size.group == 1:
            group[0].ticket.settle(pictures)
        else:
            size.group //= 2
            size.images = group + size.images
            self._faults.record(f"{size.group} images a decoder call", pictures)

    def _pictures(self, images: list[torch.Tensor], count: int) -> _Pictures:
        """Decode and score the latents (C, h, w) of images in a call of exactly `count`."""
        n, latents = len(images), torch.stack(images)
        pixels = self._family.decode(padded(latents, count))
        scores = None if self._checker is None else self._checker.scores(pixels)[:n]
        return _Pictures(pixels[:n], torch.isfinite(latents).flatten(1).all(1), scores)

    def _deliver(self) -> None:
        while (deliver := self._deliveries.get()) is not None:
            deliver()


class _Copy:
    """Decoded images on their way off the device; nothing waits for the copy to begin."""

    def __init__(self, group: list[_Finished], pictures: _Pictures) -> None:
        self._group = group
        self._pixels = _to_host(pictures.pixels)
        self._finite = _to_host(pictures.finite)
        self._scores = None if pictures.scores is None else _to_host(pictures.scores)
        self._event: Any = None
        if pictures.pixels.is_cuda:
            self._event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            self._event.record()

    def deliver(self) -> None:
        """Wait for the copy and settle the requests."""
        outcomes: list[Drawn | Exception]
        try:
            if self._event is not None:
                self._event.synchronize()
            outcomes = [self._outcome(i, image) for i, image in enumerate(self._group)]
        except torch.AcceleratorError as error:
            outcomes = [cuda.device_failed(error)] * len(self._group)
        for image, outcome in zip(self._group, outcomes, strict=True):
            image.ticket.settle(outcome)

    def show(self) -> None:
        """Wait for the copy and pass it to the request's follower."""
        image = self._group[0]
        try:
            if self._event is not None:
                self._event.synchronize()
            drawn = self._outcome(0, image)
        except torch.AcceleratorError:
            return  # the image itself will fail with it
        if image.ticket.follow is not None and isinstance(drawn, Drawn):
            _call(partial(image.ticket.follow.preview, drawn))

    def _outcome(self, i: int, image: _Finished) -> Drawn | Exception:
        if not self._finite[i]:
            return ArithmeticError(
                "The latents are not finite: the model cannot draw these values. Try another "
                "guidance_scale, or engine.dtype: float32."
            )
        scores = None
        if self._scores is not None:
            scores = tuple(round(score, 3) for score in self._scores[i].tolist())
            if not all(map(math.isfinite, scores)):
                return ArithmeticError(
                    "The safety checker's scores are not finite. Set safety.checker to another one."
                )
        return Drawn(
            image=self._pixels[i].numpy(),
            prompt_tokens=image.ticket.reading.tokens,
            prompt_truncated=image.ticket.reading.truncated,
            lanes=image.ticket.fewest_rows,
            exact=image.exact,
            nsfw=None if scores is None else any(score > 0 for score in scores),
            nsfw_scores=scores,
        )


def _call(callback: Callable[[], None]) -> None:
    try:
        callback()
    except Exception:  # noqa: BLE001  from a caller's callback: it must not end the images
        traceback.print_exc()


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_cuda:
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)

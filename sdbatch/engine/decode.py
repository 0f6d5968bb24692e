"""From finished latents to delivered images: decoding in fixed groups, copies, futures.

Decoding is the engine thread's, as it owns the device; waiting for the copy off the device and
calling whoever waits for the image is done in a thread of its own, so that no tick waits for it.
"""

import math
import queue
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from sdbatch.engine import cuda
from sdbatch.engine.cohort import Cohort, Ticket
from sdbatch.engine.request import Drawn
from sdbatch.models.sd1.family import Pictures, StableDiffusion1

GROUP = 4  # images a call of the VAE at most: always as many, padded
SIZES = 64  # that are remembered while no image of them waits
ROUNDS = 8  # that a finished image waits for others to fill its group


@dataclass(slots=True)
class _Finished:
    ticket: Ticket
    latents: torch.Tensor  # (C, h, w)
    exact: bool  # every UNet call had the engine's own lanes


@dataclass(slots=True)
class _Waiting:
    """Finished images of one size that wait for a whole group."""

    group: int
    images: list[_Finished] = field(default_factory=list)
    rounds: int = 0  # that the first of them has waited


class Finisher:
    """Decodes and delivers. All but its delivering thread belongs to the engine's thread.

    Args:
        sd: decodes.
        lanes_of: the lanes that images of a height and width are to be drawn in. Those with few are
            large, or there is little memory, and they are decoded in smaller groups.
    """

    def __init__(self, sd: StableDiffusion1, lanes_of: Callable[[int, int], int]) -> None:
        self._sd = sd
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
        """Tell whether images are still delivered."""
        return self._thread.is_alive()

    def add(self, ticket: Ticket, latents: torch.Tensor) -> None:
        """Let a request's finished latents (C, h, w) wait for a group."""
        key = (ticket.request.height, ticket.request.width)
        size = self._sizes.setdefault(key, _Waiting(self._group_of(ticket)))
        if len(self._sizes) > SIZES:
            self._sizes = {key: each for key, each in self._sizes.items() if each.images}
            self._sizes[key] = size
        exact = ticket.fewest == self._lanes_for(ticket)
        size.images.append(_Finished(ticket, latents, exact))

    def show(self, cohort: Cohort) -> list[str]:
        """Tell those who follow requests of `cohort` how far they are; decode previews due.

        Returns:
            Which previews there was no memory for: these are left out.
        """
        failed = []
        for i in cohort.alive:
            ticket = cohort.tickets[i]
            if ticket.follow is not None:
                step = partial(ticket.follow.step, cohort.step, ticket.ticks)
                self._deliveries.put(partial(_tell, step))
        for ticket, latents in cohort.seen:
            try:
                pictures = self._sd.decode(latents[None], 1)
            except torch.AcceleratorError:
                raise
            except Exception as error:  # noqa: BLE001  out of memory: an image less to look at
                failed.append(f"0 images of a preview ({type(error).__name__}: {error})")
            else:
                self._deliveries.put(_Copy([_Finished(ticket, latents, False)], pictures).show)
        return failed

    def decode(self, *, hurry: bool) -> list[str]:
        """Decode the groups that are whole, and if `hurry` or long awaited also those that are not.

        Returns:
            What ran out of memory: that size is decoded in smaller groups from then on.
        """
        shrunk = []
        for size in self._sizes.values():
            size.rounds += bool(size.images)
            while len(size.images) >= size.group or (
                size.images and (hurry or size.rounds > ROUNDS)
            ):
                size.rounds = 0
                group, size.images = size.images[: size.group], size.images[size.group :]
                if (reason := self._decode(group, size)) is not None:
                    shrunk.append(reason)
        return shrunk

    def close(self) -> None:
        """Deliver what was decoded, then stop."""
        self._deliveries.put(None)
        self._thread.join()

    def _group_of(self, ticket: Ticket) -> int:
        return max(1, min(GROUP, self._lanes_for(ticket) // 2))

    def _lanes_for(self, ticket: Ticket) -> int:
        return self._lanes_of(ticket.request.height, ticket.request.width)

    def _decode(self, group: list[_Finished], size: _Waiting) -> str | None:
        try:
            latents = torch.stack([image.latents for image in group])
            count = size.group
            if not any(image.ticket.exact for image in group):
                count = min(count, 1 << (len(group) - 1).bit_length())
            pictures = self._sd.decode(latents, count)
        except torch.AcceleratorError:
            raise
        except Exception as error:  # noqa: BLE001  tried in smaller groups, then of this row
            if size.group == 1:
                group[0].ticket.settle(error)
                return None
            size.group //= 2
            size.images = group + size.images
            return f"{size.group} images a VAE call ({type(error).__name__}: {error})"
        for image in group:
            image.exact &= count == self._group_of(image.ticket)
        self._deliveries.put(_Copy(group, pictures).deliver)
        return None

    def _deliver(self) -> None:
        while (deliver := self._deliveries.get()) is not None:
            deliver()


class _Copy:
    """Decoded images on their way off the device; the copy begins at once and is not waited for."""

    def __init__(self, group: list[_Finished], pictures: Pictures) -> None:
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
            outcomes = [cuda.failed(error)] * len(self._group)
        for image, outcome in zip(self._group, outcomes, strict=True):
            image.ticket.settle(outcome)

    def show(self) -> None:
        """Wait for the copy and show it to those who follow."""
        image = self._group[0]
        try:
            if self._event is not None:
                self._event.synchronize()
            drawn = self._outcome(0, image)
        except torch.AcceleratorError:
            return  # the image itself will say so
        if image.ticket.follow is not None and isinstance(drawn, Drawn):
            _tell(partial(image.ticket.follow.preview, drawn))

    def _outcome(self, i: int, image: _Finished) -> Drawn | Exception:
        if not self._finite[i]:
            return ArithmeticError(
                "latents = not finite: the model drew no picture for these values"
            )
        scores = None
        if self._scores is not None:
            scores = tuple(round(score, 3) for score in self._scores[i].tolist())
            if not all(map(math.isfinite, scores)):
                return ArithmeticError("nsfw_scores = not finite: the safety checker is broken")
        return Drawn(
            image=self._pixels[i].numpy(),
            prompt_tokens=image.ticket.prompts.tokens,
            prompt_truncated=image.ticket.prompts.truncated,
            lanes=image.ticket.fewest,
            exact=image.exact,
            nsfw=None if scores is None else any(score > 0 for score in scores),
            nsfw_scores=scores,
        )


def _tell(what: Callable[[], None]) -> None:
    try:
        what()
    except Exception:  # noqa: BLE001  of a caller's callback, and so not the images' end
        traceback.print_exc()


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_cuda:
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)

"""From finished latents to delivered images: decoding in fixed groups, copies, futures.

The engine's thread decodes, as it owns the device. A second thread waits for the copies off the
device and settles the futures, so that no tick waits for them. That thread is the first to see a
picture that is not finite, and returns its latents to the engine's thread, which decodes them again
in float32.
"""

import math
import queue
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from sdbatch.engine import cuda
from sdbatch.engine.clock import Account, DeviceClock
from sdbatch.engine.cohort import Cohort, Ticket
from sdbatch.engine.family import Family
from sdbatch.engine.faults import FaultPolicy, is_lack_of_memory
from sdbatch.engine.lanes import padded
from sdbatch.engine.limits import CallSizes
from sdbatch.engine.request import Drawn

MAX_IDLE_SIZES = 64  # image sizes that are kept while no image of them waits
MAX_TICKS = 8  # of its shape, for which a finished image waits for others to fill its group
MOST_COPIES = 16  # groups on their way off the device, in pinned memory; then the engine waits
WIDEST = torch.float32  # for pictures that are not finite in the family's type


class SafetyChecker(Protocol):
    """Scores pictures by concept."""

    def scores(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the scores, (n, concepts), of pictures (n, H, W, 3) uint8; above 0 is flagged."""


@dataclass(frozen=True, slots=True)
class _Pictures:
    """Decoded images, still on the device."""

    pixels: torch.Tensor  # (n, H, W, 3) uint8
    finite: torch.Tensor  # (2, n) bool: whether the latents are, and the pictures
    scores: torch.Tensor | None  # (n, concepts) of the safety checker


@dataclass(slots=True)
class _Finished:
    ticket: Ticket
    latents: torch.Tensor  # (C, h, w)
    exact: bool  # every denoiser call had the engine's full number of rows
    dtype: torch.dtype  # in which it is decoded
    again: bool = False  # it was not finite in the family's own type
    first_pass: bool = False  # of hires fix: its picture is enlarged and drawn again
    tick: int = 0  # that a preview shows; 0: it is the image itself
    since: int = 0  # ticks of its shape when it began to wait for a group


@dataclass(slots=True)
class _Waiting:
    """Finished images of one size that wait for a full group."""

    group: int
    images: list[_Finished] = field(default_factory=list)

    @property
    def is_ready(self) -> bool:
        """Tell whether a group can be decoded: a full one, or one for which no others come."""
        if not self.images or len(self.images) >= self.group:
            return bool(self.images)
        account = self.account
        return not account.drawing or account.ticks - self.images[0].since > MAX_TICKS

    @property
    def account(self) -> Account:
        """Return the account of the image that waits longest."""
        return self.images[0].ticket.account


class Decoder:
    """Decodes and delivers. All but its delivering thread belongs to the engine's thread.

    Args:
        family: decodes.
        checker: scores what was decoded, if there is one.
        faults: handles what a decoder call raises.
        clock: charges the accounts of the requests with the decoder calls.
        sizes: how many images a call has.
        wake: is called by the delivering thread after each delivery.
    """

    def __init__(
        self,
        family: Family,
        checker: SafetyChecker | None,
        faults: FaultPolicy,
        clock: DeviceClock,
        sizes: CallSizes,
        wake: Callable[[], None],
    ) -> None:
        self._family = family
        self._checker = checker
        self._faults = faults
        self._clock = clock
        self._call_sizes = sizes
        self._wake = wake
        self._sizes: dict[tuple[int, int, torch.dtype], _Waiting] = {}
        # returned by the delivering thread
        self._again: deque[_Finished] = deque()
        self._first_passes: deque[tuple[Ticket, NDArray[np.uint8]]] = deque()
        self._deliveries: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._free = threading.Semaphore(MOST_COPIES)
        self._sent = self._delivered = 0  # counted by one thread each
        self.alive = True  # the delivering thread
        self._thread = threading.Thread(target=self._deliver, name="sdbatch-deliver", daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Tell whether images wait to be decoded."""
        returned = self._again or self._first_passes
        return bool(returned) or any(size.images for size in self._sizes.values())

    @property
    def delivering(self) -> bool:
        """Tell whether images are on their way, which may come back to be decoded again."""
        return self.alive and self._sent != self._delivered

    def add(self, ticket: Ticket, latents: torch.Tensor) -> None:
        """Queue a request's finished latents (C, h, w) for a group."""
        exact = ticket.full_before and ticket.fewest_rows == self._lanes_for(ticket)
        first_pass = ticket.request.enlarged() is not None
        finished = _Finished(ticket, latents, exact, self._family.dtype, first_pass=first_pass)
        self._queue(finished)

    def take_first_passes(self) -> Iterator[tuple[Ticket, NDArray[np.uint8]]]:
        """Yield each request whose first pass is decoded, with its picture (H, W, 3)."""
        while self._first_passes:
            yield self._first_passes.popleft()

    def report(self, cohort: Cohort) -> None:
        """Report the progress of a cohort to its followers, with the previews that are due.

        A preview that there is no memory for is left out.
        """
        for i in cohort.alive:
            ticket = cohort.tickets[i]
            if ticket.follow is not None:
                step = partial(ticket.follow.step, *ticket.progress(cohort.step))
                self._send(partial(_call, step))
        for ticket, latents in cohort.previews:
            tick, _ = ticket.progress(cohort.step)
            self._preview(_Finished(ticket, latents, False, self._family.dtype, tick=tick))

    def decode(self, is_due: Callable[[Account], bool]) -> bool:
        """Decode a group that is full, or for which no other images come.

        Args:
            is_due: tells whether a call for an account may be made now.

        Returns:
            Whether there was a group for which it may.
        """
        while self._again:
            image = self._again.popleft()
            if image.tick:
                self._preview(image)
            else:
                self._queue(image)
        ready = [size for size in self._sizes.values() if size.is_ready]
        size = min(ready, key=lambda each: each.account.seconds, default=None)
        if size is None or not is_due(size.account):
            return False
        group, size.images = size.images[: size.group], size.images[size.group :]
        self._decode(group, size)
        return True

    def try_out(self, ticket: Ticket, latents: torch.Tensor) -> None:
        """Decode latents (C, h, w) in a full group and discard the picture.

        Raises what a call raises, if its cause is not a lack of memory for the whole group.
        """
        image = _Finished(ticket, latents, False, self._family.dtype)
        size = self._size_of(image)
        while True:
            try:
                self._copy([image], size.group)
                return
            except Exception as error:
                if not is_lack_of_memory(error) or size.group == 1:
                    raise
                self._shrink(size, error.with_traceback(None))

    def close(self) -> None:
        """Deliver what was decoded, then stop."""
        self._deliveries.put(None)
        self._thread.join()

    def _send(self, deliver: Callable[[], None]) -> None:
        """Have the delivering thread call `deliver`."""
        self._sent += 1
        self._deliveries.put(deliver)

    def _send_copy(self, deliver: Callable[[], None]) -> None:
        """Have a copy delivered; wait while many are on their way."""
        while not self._free.acquire(timeout=1):
            if not self.alive:
                break

        def deliver_and_release() -> None:
            try:
                deliver()
            finally:
                self._free.release()

        self._send(deliver_and_release)

    def _queue(self, image: _Finished) -> None:
        image.since = image.ticket.account.ticks
        self._size_of(image).images.append(image)

    def _size_of(self, image: _Finished) -> _Waiting:
        request = image.ticket.request
        key = (request.height, request.width, image.dtype)
        size = self._sizes.setdefault(key, _Waiting(self._group_of(image.ticket)))
        if len(self._sizes) > MAX_IDLE_SIZES:
            self._sizes = {key: each for key, each in self._sizes.items() if each.images}
            self._sizes[key] = size
        return size

    def _preview(self, image: _Finished) -> None:
        with self._clock.charge([image.ticket.account]):
            copy = self._faults.decode(partial(self._copy, [image], 1))
        if isinstance(copy, Exception):
            self._faults.record("no preview", copy)
        else:
            self._send_copy(copy.show)

    def _group_of(self, ticket: Ticket) -> int:
        return self._call_sizes.group_of(ticket.request.height, ticket.request.width)

    def _lanes_for(self, ticket: Ticket) -> int:
        return self._call_sizes.lanes_of(ticket.request.height, ticket.request.width)

    def _decode(self, group: list[_Finished], size: _Waiting) -> None:
        count = size.group
        if not any(image.ticket.exact for image in group):
            count = min(count, 1 << (len(group) - 1).bit_length())
        with self._clock.charge([image.ticket.account for image in group]):
            copy = self._faults.decode(partial(self._copy, group, count))
        if isinstance(copy, _Copy):
            for image in group:
                image.exact &= count == self._group_of(image.ticket)
            self._send_copy(copy.deliver)
        elif is_lack_of_memory(copy) and size.group > 1:
            size.images = group + size.images
            self._shrink(size, copy)
        elif len(group) > 1:  # one of them may be the cause
            for image in group:
                self._decode([image], size)
        else:
            group[0].ticket.settle(copy)

    def _shrink(self, size: _Waiting, error: Exception) -> None:
        size.group //= 2
        self._faults.record(f"{size.group} images a decoder call", error)

    def _copy(self, group: list[_Finished], count: int) -> "_Copy":
        return _Copy(group, self._pictures(group, count), self._return)

    def _return(self, image: _Finished, picture: NDArray[np.uint8] | None) -> None:
        """Take back an image: to be decoded again, or with the picture of a first pass."""
        if picture is None:
            self._again.append(image)
        else:
            self._first_passes.append((image.ticket, picture))

    def _pictures(self, group: list[_Finished], count: int) -> _Pictures:
        """Decode and score images of one type in a call of exactly `count`."""
        n, latents = len(group), torch.stack([image.latents for image in group])
        pictures = self._family.decode(padded(latents, count), group[0].dtype)
        scores = None if self._checker is None else self._checker.scores(pictures.pixels)[:n]
        finite = torch.stack([latents.isfinite().flatten(1).all(1), pictures.finite[:n]])
        return _Pictures(pictures.pixels[:n], finite, scores)

    def _deliver(self) -> None:
        try:
            while (deliver := self._deliveries.get()) is not None:
                deliver()
                self._delivered += 1
                self._wake()
        finally:
            self.alive = False
            self._wake()


class _Copy:
    """Decoded images on their way off the device; nothing waits for the copy to begin.

    Args:
        group: the images.
        pictures: what was decoded.
        give_back: is called with an image that must be decoded again, in a wider type, or with
            the picture of a first pass.
    """

    def __init__(
        self,
        group: list[_Finished],
        pictures: _Pictures,
        give_back: Callable[[_Finished, NDArray[np.uint8] | None], None],
    ) -> None:
        self._group = group
        self._give_back = give_back
        self._pixels = _to_host(pictures.pixels)
        self._finite = _to_host(pictures.finite)
        self._scores = None if pictures.scores is None else _to_host(pictures.scores)
        self._event: Any = None
        if pictures.pixels.device.type != "cpu":
            self._event = torch.Event(pictures.pixels.device, blocking=True)
            self._event.record()

    def deliver(self) -> None:
        """Wait for the copy and settle the requests, or have their images decoded again."""
        for i, image in enumerate(self._group):
            outcome: Drawn | Exception | None
            try:
                self._wait()
                outcome = self._outcome(i, image)
            except torch.AcceleratorError as error:
                outcome = cuda.device_failed(error)
            except Exception as error:  # noqa: BLE001  of the copy; this thread must go on
                outcome = error
            if outcome is not None:
                image.ticket.settle(outcome)

    def show(self) -> None:
        """Wait for the copy and pass it to the request's follower, unless a later one was."""
        image = self._group[0]
        ticket = image.ticket
        try:
            self._wait()
            drawn = self._outcome(0, image)
        except Exception:  # noqa: BLE001  the image itself will fail with it
            return
        if ticket.follow is None or not isinstance(drawn, Drawn):
            return
        if image.tick > ticket.previewed and not ticket.settled:
            ticket.previewed = image.tick
            _call(partial(ticket.follow.preview, drawn))

    def _wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()

    def _outcome(self, i: int, image: _Finished) -> Drawn | Exception | None:
        """Return how a request ends; None if its image is decoded or drawn again."""
        latents, pixels = self._finite[:, i].tolist()
        if not latents:
            return ArithmeticError(
                "The latents are not finite: the model cannot draw these values. Try another "
                "guidance_scale, or engine.dtype: float32."
            )
        if not pixels and image.dtype != WIDEST:
            image.dtype, image.again = WIDEST, True
            self._give_back(image, None)
            return None
        if not pixels:
            return ArithmeticError(
                "The decoded picture is not finite in float32, the widest engine.dtype: the model "
                "cannot decode these latents. Try another guidance_scale, or a model with another "
                "decoder."
            )
        scores = None
        if self._scores is not None:
            scores = tuple(round(score, 3) for score in self._scores[i].tolist())
            if not all(map(math.isfinite, scores)):
                return ArithmeticError(
                    "The safety checker's scores are not finite. Set safety.checker to another one."
                )
        picture = self._pixels[i].numpy()
        if self._event is not None:
            # out of pinned memory, which the images that wait to be encoded would fill
            picture = picture.copy()
        if image.first_pass:
            self._give_back(image, picture)
            return None
        return Drawn(
            image=picture,
            prompt_tokens=image.ticket.reading.tokens,
            prompt_truncated=image.ticket.reading.truncated,
            lanes=min(
                image.ticket.fewest_rows, image.ticket.rows_before or image.ticket.fewest_rows
            ),
            exact=image.exact,
            decoded_again=image.again,
            nsfw=None if scores is None else any(score > 0 for score in scores),
            nsfw_scores=scores,
        )


def _call(callback: Callable[[], None]) -> None:
    try:
        callback()
    except Exception:  # noqa: BLE001  from a caller's callback: it must not end the images
        traceback.print_exc()


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.device.type == "cpu":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)

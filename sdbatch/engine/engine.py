"""The engine: requests in, futures of drawn images out; one thread owns the device.

Round after round it admits waiting requests into free lanes, advances all requests of one shape by
one denoiser call, and decodes what is finished. Read `_round`.
"""

import math
import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from sdbatch.engine import cuda
from sdbatch.engine.clock import clock_of
from sdbatch.engine.cohort import Ticket
from sdbatch.engine.decode import Decoder, SafetyChecker
from sdbatch.engine.device import device_facts
from sdbatch.engine.encode import Encoder
from sdbatch.engine.enlarge import enlarge_latents, with_enlarged
from sdbatch.engine.family import Family, Original, Reading
from sdbatch.engine.faults import FaultPolicy, cannot_draw, is_lack_of_memory
from sdbatch.engine.lanes import Lanes
from sdbatch.engine.limits import DECODE_GROUP, CallSizes
from sdbatch.engine.request import Drawn, Follow, Request, Usage
from sdbatch.engine.turns import Turns
from sdbatch.errors import ModelError
from sdbatch.sampling import LATENT_UPSCALERS, Sampling

ENCODING = 8  # ticks after which a group of pictures is encoded, whatever else waits
# The sampling keys that the engine itself honours, for every family.
ENGINE_KEYS = frozenset(
    {
        "seed",
        "sampler",
        "num_inference_steps",
        "guidance_scale",
        "guidance_rescale",
        "guidance_start",
        "guidance_stop",
        "guidance_sigma_low",
        "guidance_sigma_high",
        "eta",
        "height",
        "width",
        "variation_seed",
        "variation_strength",
        "seed_b",
        "mix",
        "hires_scale",
        "hires_upscaler",
        "hires_steps",
        "hires_strength",
    }
)


class Engine:
    """Draws requests on one device.

    Args:
        family: the loaded model.
        lanes: rows of the denoiser's batch, at least those of a guided image: two, or three.
        threads: of torch on a CPU; they are part of what decides the bits.
        pixels: of the images that `lanes` are meant for; larger ones get fewer lanes.
        checker: scores the images, if they are to be checked.
        decode_group: images in a decoder call at most.
    """

    def __init__(
        self,
        family: Family,
        *,
        lanes: int,
        threads: int,
        pixels: int | None = None,
        checker: SafetyChecker | None = None,
        decode_group: int = DECODE_GROUP,
    ) -> None:
        self.device = device_facts(family.device.type)
        self._usage = Usage()
        self._sizes = CallSizes(lanes, pixels, family.limits.image_lanes, decode_group)
        self._threads = threads
        self._family = family
        self._faults = FaultPolicy(self._usage, self._check)
        self._turns = Turns()
        self._clock = clock_of(family.device)
        self._changed = threading.Condition()
        self._decoder = Decoder(family, checker, self._faults, self._clock, self._sizes, self._wake)
        self._encoder = Encoder(family, self._faults, self._clock, self._sizes, self._put)
        self._unused_keys = {
            name: field.default
            for name, field in Sampling.model_fields.items()
            if name not in ENGINE_KEYS | family.keys
        }
        self._example: Request | None = None
        self._warming_up: Future[None] | None = None
        self._arrived: deque[Ticket] = deque()
        self._open: set[Ticket] = set()  # all that have not ended
        self._began: float | None = None
        self._round_began: float | None = None  # None: nothing to do
        self._closed = self._cancelled = False
        self._reason = ModelError("The engine is closed and accepts no more requests.")
        self._thread = threading.Thread(target=self._run, name="sdbatch-engine", daemon=True)
        self._thread.start()

    @property
    def usage(self) -> Usage:
        """Return what the engine has done so far."""
        seconds = 0.0 if self._began is None else time.perf_counter() - self._began
        return replace(self._usage, seconds=seconds, shrunk=list(self._usage.shrunk))

    @property
    def stalled_seconds(self) -> float:
        """Return the seconds since the last round began while there is work; infinite if ended."""
        if not (self._thread.is_alive() and self._decoder.alive):
            return math.inf
        round_began = self._round_began
        return 0.0 if round_began is None else time.perf_counter() - round_began

    def submit(
        self, request: Request, *, exact: bool = True, follow: Follow | None = None
    ) -> Future[Drawn]:
        """Queue `request`; its future ends with the image or with the reason for its failure.

        May be called from any thread. Cancelling the future releases its lanes. A ModelError in it
        is not the request's fault: the engine cannot go on.

        Args:
            request: what to draw.
            exact: draw it in batches of the engine's full shape. Otherwise batches are as small as
                their requests allow: faster, and the same pixels but for rounding.
            follow: is called with the progress.
        """
        try:
            exact |= self._family.compiled  # each number of rows would be compiled
            ticket = Ticket(request, self._read(request), exact, follow)
        except Exception as error:  # noqa: BLE001  caused by this request
            failed: Future[Drawn] = Future()
            failed.set_exception(error)
            return failed
        with self._changed:
            if self._closed:
                raise self._reason
            self._began = self._began or time.perf_counter()
            self._open.add(ticket)
            self._arrived.append(ticket)
            self._changed.notify()
        ticket.future.add_done_callback(lambda _: self._open.discard(ticket))
        return ticket.future

    def check(self, request: Request) -> None:
        """Raise a ValueError if the model cannot draw requests with these sampling values.

        Before the first request only: it uses what later belongs to the engine's thread.
        """
        self._read(request)
        self._family.sigmas(request)

    def warm_up(self, request: Request) -> None:
        """Draw a tick, a group of text and a decoding of `request` in full calls; discard them.

        So what would fail every request fails here, and too little memory reduces the lanes before
        the first one. Once, after `check`.

        Raises:
            ModelError: the model cannot draw on this device.
        """
        done: Future[None] = Future()
        with self._changed:
            self._example, self._warming_up = request, done
            self._changed.notify()
        done.result()

    def close(self, *, cancel: bool = False) -> None:
        """Draw what was submitted, or cancel it; then stop."""
        with self._changed:
            self._closed = True
            self._cancelled |= cancel
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        torch.set_num_threads(self._threads)
        cuda.allow_many_shapes()
        reason = ModelError("The engine stopped after an internal error. See the log.")
        try:
            with torch.inference_mode():
                while self._receive():
                    self._round_began = time.perf_counter()
                    self._round()
        except torch.AcceleratorError as error:
            reason = cuda.device_failed(error)
        except ModelError as error:
            reason = error
        finally:
            self._stop(reason)

    def _receive(self) -> bool:
        """Queue what was submitted, waiting if there is no work; tell whether to go on."""
        with self._changed:
            # an image that is being delivered may come back to be decoded again
            self._changed.wait_for(lambda: self._has_work or not self._decoder.delivering)
            if not self._has_work and not self._closed:
                self._wait()
            going = not self._cancelled and (self._has_work or not self._closed)
        self._enqueue_arrived()
        return going

    def _enqueue_arrived(self) -> None:
        with self._changed:
            arrived, self._arrived = self._arrived, deque()
        for ticket in arrived:
            self._enqueue(ticket)

    @property
    def _has_work(self) -> bool:
        busy = self._decoder.busy or self._encoder.busy or self._turns.busy
        return busy or bool(self._arrived) or self._cancelled or self._warming_up is not None

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify()

    def _wait(self) -> None:
        began, self._round_began = time.perf_counter(), None
        while not self._arrived and not self._closed and self._warming_up is None:
            self._changed.wait()
        if self._began is not None:
            self._usage.idle_seconds += max(0.0, time.perf_counter() - max(began, self._began))

    def _read(self, request: Request) -> Reading:
        self._family.limits.check_size(request.height, request.width)
        for name, default in () if request.second_pass else self._unused_keys.items():
            if (value := getattr(request, name)) != default:
                raise ValueError(
                    f"{name} = {value!r}: must be {default!r}, this model has no {name}"
                )
        reading = self._family.read(request)
        if (enlarged := request.enlarged()) is not None:
            self._read(enlarged)
        return reading

    def _enqueue(self, ticket: Ticket) -> None:
        """Queue a request for lanes, or first for the encoding of its pictures."""
        request = ticket.request
        try:
            ticket.sigmas = self._family.sigmas(request)
            if (enlarged := request.enlarged()) is not None:
                ticket.ticks_after = len(self._family.sigmas(enlarged))
        except Exception as error:  # noqa: BLE001  caused by these values
            ticket.settle(error)
            return
        if ticket.reading.pictures:
            self._lanes_for(ticket)  # whose account pays for the encoding
            self._encoder.add(ticket)
        else:
            self._put(ticket)

    def _put(self, ticket: Ticket) -> None:
        self._lanes_for(ticket).put(ticket)

    def _lanes_for(self, ticket: Ticket) -> Lanes:
        request = ticket.request
        shape = self._family.shape(request, ticket.reading)
        count = self._sizes.lanes_of(request.height, request.width)
        lanes = self._turns.lanes_for(shape, lambda: Lanes(self._family, count))
        ticket.account = lanes.account
        return lanes

    def _round(self) -> None:
        """Encode and decode what is due; then admit and tick once for the next shape."""
        if self._warming_up is not None:
            self._finish_warm_up(self._warming_up)
        for ticket, picture in self._decoder.take_first_passes():
            self._begin_second_pass(ticket, picture=picture)
        self._turns.choose_candidates()
        self._encode()
        while self._decoder.decode(self._turns.is_due):
            self._look_again()
        lanes = self._turns.next()
        if lanes is not None:
            self._advance(lanes)

    def _encode(self) -> None:
        """Encode pictures until as many requests wait as there are lanes, and some now and then."""
        if self._usage.ticks % ENCODING == 0:
            # so that long requests among them are known in time
            self._encoder.encode(self._turns.is_due)
        while self._turns.waiting < self._sizes.lanes and self._encoder.encode(self._turns.is_due):
            self._look_again()

    def _look_again(self) -> None:
        """Queue what has arrived during a call: it may be due before the next one."""
        self._enqueue_arrived()
        self._turns.choose_candidates()

    def _finish_warm_up(self, done: Future[None]) -> None:
        self._warming_up = None
        try:
            self._draw_example()
        except ModelError as error:
            done.set_exception(error)
        else:
            done.set_result(None)

    def _check(self, error: Exception) -> None:
        """Raise a ModelError if, after an exception, the engine can draw nothing."""
        if self._example is not None:
            self._draw_example()
        elif not self._usage.ticks:
            raise cannot_draw(error) from error

    def _draw_example(self) -> None:
        assert self._example is not None, "there is an example"
        ticket = Ticket(self._example, self._read(self._example))
        ticket.sigmas = self._family.sigmas(self._example)
        lanes = self._lanes_for(ticket)
        try:
            while not self._fits(lanes, ticket):
                pass
        except Exception as error:
            raise cannot_draw(error) from error

    def _fits(self, lanes: Lanes, ticket: Ticket) -> bool:
        """Try a request in a tick of as many rows and in a decoding; if it fails, halve `lanes`."""
        trial = Lanes(self._family, lanes.count)
        try:
            trial.start([ticket])
            trial.tick(lambda _, call: call())
            self._decoder.try_out(ticket, trial.cohorts[0].latents[0])
        except Exception as error:
            if not is_lack_of_memory(error) or lanes.count == lanes.least:
                raise
            self._faults.halve(lanes, error.with_traceback(None))
            return False
        return True

    def _advance(self, lanes: Lanes) -> None:
        """Admit waiting requests and advance all by a denoiser call; pass on the finished ones."""
        with self._clock.charge([lanes.account]):
            self._faults.guard(lanes, partial(self._join, lanes))
            self._faults.guard(lanes, partial(self._tick, lanes))
        self._faults.guard(lanes, partial(self._report, lanes))
        for ticket, latents in lanes.take_done():
            enlarged = ticket.request.enlarged()
            if enlarged is not None and enlarged.hires_upscaler in LATENT_UPSCALERS:
                self._begin_second_pass(ticket, latents=latents)
            else:
                self._decoder.add(ticket, latents)

    def _join(self, lanes: Lanes) -> None:
        """Start cohorts of the waiting requests that fit."""
        lanes.drop_cancelled()
        joining = deque(lanes.admit())
        try:
            while joining:
                self._faults.start(lanes, joining[0])
                joining.popleft()
        finally:
            for tickets in joining:
                lanes.put_back(tickets)

    def _tick(self, lanes: Lanes) -> None:
        if not lanes.cohorts:
            return
        rows, filled = lanes.tick(self._faults.attempt)
        lanes.account.ticks += 1
        self._usage.ticks += 1
        self._usage.rows += rows
        self._usage.filled += filled

    def _report(self, lanes: Lanes) -> None:
        for cohort in lanes.cohorts:
            self._decoder.report(cohort)

    def _begin_second_pass(
        self,
        ticket: Ticket,
        *,
        latents: torch.Tensor | None = None,
        picture: NDArray[np.uint8] | None = None,
    ) -> None:
        """Queue the second pass of hires fix, from the first one's latents or its picture."""
        first = ticket.request
        full = ticket.fewest_rows == self._sizes.lanes_of(first.height, first.width)
        try:
            ticket.begin_second_pass(full=full)
            if latents is not None:
                ticket.original = Original(enlarge_latents(latents, first, ticket.request))
            elif picture is not None:
                ticket.request = with_enlarged(ticket.request, picture)
            ticket.reading = self._read(ticket.request)
        except Exception as error:  # noqa: BLE001  caused by this request
            ticket.settle(error)
            return
        self._enqueue(ticket)

    def _stop(self, reason: ModelError) -> None:
        """Accept no more requests; end the unfinished ones with `reason`."""
        with self._changed:
            if not self._closed:
                self._closed, self._reason = True, reason
        self._decoder.close()
        if self._warming_up is not None:
            self._warming_up.set_exception(reason)
        for ticket in list(self._open):
            if self._cancelled:
                ticket.future.cancel()
            ticket.settle(reason)

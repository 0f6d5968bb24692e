"""The engine: requests in, futures of drawn images out; one thread owns the device.

Round after round it admits waiting requests into free lanes, advances all requests of one shape by
one UNet call, and decodes what is finished. Read `_round`.
"""

import math
import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import replace

import torch

from sdbatch.engine import cuda
from sdbatch.engine.cohort import Ticket
from sdbatch.engine.decode import Finisher
from sdbatch.engine.lanes import LEAST, Lanes, Schedulers
from sdbatch.engine.request import Drawn, Follow, Request, Usage
from sdbatch.errors import ModelError
from sdbatch.models.sd1.family import Shape, StableDiffusion1
from sdbatch.models.sd1.loading import Model, allow_many_shapes

SHAPES = 64  # without requests that are kept, as making one takes no time
TURN = 32  # ticks that a shape keeps the device while others wait


class Engine:
    """Draws requests on one device.

    Args:
        model: the loaded parts.
        lanes: rows of the UNet batch, at least 2; a guided image takes two.
        threads: of torch on a CPU; part of what decides the bits.
        pixels: of the images that `lanes` are meant for; larger ones get fewer lanes.
    """

    def __init__(
        self, model: Model, *, lanes: int, threads: int, pixels: int | None = None
    ) -> None:
        self._count = Usage()
        self._lanes = lanes
        self._threads = threads
        self._sd = StableDiffusion1(model)
        self._schedulers = Schedulers(model.scheduler_config)
        self._shapes: dict[Shape, Lanes] = {}
        self._turns: deque[Shape] = deque()  # the first has the device
        self._turn_left = TURN
        self._pixels = pixels
        self._finisher = Finisher(self._sd, self._lanes_of)
        self._arrived: deque[Ticket] = deque()
        self._open: set[Ticket] = set()  # all that have not ended
        self._began: float | None = None
        self._round_began: float | None = None  # None: nothing to do
        self._closed = self._cancelled = False
        self._reason = ModelError("engine = closed: takes no more requests.")
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="sdbatch-engine", daemon=True)
        self._thread.start()

    @property
    def usage(self) -> Usage:
        """Return what the engine has done so far."""
        seconds = 0.0 if self._began is None else time.perf_counter() - self._began
        return replace(self._count, seconds=seconds, shrunk=list(self._count.shrunk))

    @property
    def stalled_seconds(self) -> float:
        """Return for how long the engine, with work to do, has not begun another round."""
        if not (self._thread.is_alive() and self._finisher.alive):
            return math.inf
        round_began = self._round_began
        return 0.0 if round_began is None else time.perf_counter() - round_began

    def submit(
        self, request: Request, *, exact: bool = True, follow: Follow | None = None
    ) -> Future[Drawn]:
        """Queue `request`; its future ends with the image or with why it could not be drawn.

        May be called from any thread. The future can be cancelled until it ends, which frees its
        lanes. A ModelError in it is no fault of the row: the engine cannot go on.

        Args:
            request: what to draw.
            exact: draw it in batches of the engine's own shape. Otherwise they are as small as
                those who are drawn need: sooner done, and the same but for rounding.
            follow: is told how far it is.
        """
        try:
            ticket = Ticket(request, self._sd.read(request), exact, follow)
        except Exception as error:  # noqa: BLE001  of this row's text
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
        """Raise a ValueError if no request with these sampling values can be drawn."""
        self._sd.read(request)
        self._schedulers.ticks(request.sampler, request.num_inference_steps)

    def close(self, *, cancel: bool = False) -> None:
        """Draw what was submitted, or cancel it; then stop."""
        with self._changed:
            self._closed = True
            self._cancelled |= cancel
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        torch.set_num_threads(self._threads)
        allow_many_shapes()
        reason = ModelError("engine = stopped by a fault of its own: see the log.")
        try:
            with torch.inference_mode():
                while self._receive():
                    self._round_began = time.perf_counter()
                    self._round()
        except torch.AcceleratorError as error:
            reason = cuda.failed(error)
        finally:
            self._stop(reason)

    def _receive(self) -> bool:
        """Take in what was submitted, waiting if there is nothing to do; tell whether to go on."""
        with self._changed:
            busy = self._finisher.busy or any(lanes.busy for lanes in self._shapes.values())
            if not busy and not self._arrived and not self._closed:
                self._wait()
            arrived, self._arrived = self._arrived, deque()
            going = not self._cancelled and (busy or bool(arrived) or not self._closed)
        for ticket in arrived:
            self._put(ticket)
        return going

    def _wait(self) -> None:
        began, self._round_began = time.perf_counter(), None
        while not self._arrived and not self._closed:
            self._changed.wait()
        if self._began is not None:
            self._count.idle_seconds += max(0.0, time.perf_counter() - max(began, self._began))

    def _put(self, ticket: Ticket) -> None:
        request = ticket.request
        try:
            ticket.ticks = self._schedulers.ticks(request.sampler, request.num_inference_steps)
        except Exception as error:  # noqa: BLE001  diffusers' or numpy's, of these values
            ticket.settle(error)
            return
        shape = self._sd.shape(request, ticket.prompts)
        if shape not in self._shapes:
            self._forget_idle()
            lanes = self._lanes_of(request.height, request.width)
            self._shapes[shape] = Lanes(self._sd, self._schedulers, lanes)
            self._turns.append(shape)
        self._shapes[shape].put(ticket)

    def _forget_idle(self) -> None:
        """Keep no more shapes than SHAPES that nobody stands in: a service is asked for any."""
        idle = [shape for shape in self._turns if not self._shapes[shape].busy]
        for shape in idle[: max(0, len(idle) - SHAPES)]:
            del self._shapes[shape]
            self._turns.remove(shape)

    def _lanes_of(self, height: int, width: int) -> int:
        """Return the lanes of a size: as many pixels a UNet call as `lanes` are meant for."""
        if self._pixels is None or height * width <= self._pixels:
            return self._lanes
        return max(LEAST, self._lanes * self._pixels // (height * width))

    def _round(self) -> None:
        """Admit, tick and decode once, for the shape whose turn it is."""
        if any(lanes.busy for lanes in self._shapes.values()):
            lanes = self._whose_turn()
            try:
                self._advance(lanes)
            except torch.AcceleratorError:
                raise
            except Exception as error:  # noqa: BLE001  out of memory, as a rule
                self._shrink(lanes, error)
        hurry = not any(lanes.busy for lanes in self._shapes.values())
        self._count.shrunk += self._finisher.decode(hurry=hurry)

    def _whose_turn(self) -> Lanes:
        """Return the lanes that tick next: a shape has TURN ticks, then the next that has work."""
        self._turn_left -= 1
        if self._turn_left <= 0 or not self._shapes[self._turns[0]].busy:
            self._turn_left = TURN
            self._turns.rotate(-1)
            while not self._shapes[self._turns[0]].busy:
                self._turns.rotate(-1)
        return self._shapes[self._turns[0]]

    def _advance(self, lanes: Lanes) -> None:
        lanes.drop_cancelled()
        joining = deque(lanes.admit())
        try:
            while joining:
                self._start(lanes, joining[0])
                joining.popleft()
        finally:
            for tickets in joining:
                lanes.put_back(tickets)
        if lanes.cohorts:
            rows, filled, faults = lanes.tick()
            self._count.ticks += 1
            self._count.rows += rows
            self._count.filled += filled
            for cohort, error in faults:
                self._blame(lanes, lanes.give_up([cohort]), error)
            for cohort in lanes.cohorts:
                self._count.shrunk += self._finisher.show(cohort)
        for ticket, latents in lanes.take_done():
            self._finisher.add(ticket, latents)

    def _start(self, lanes: Lanes, tickets: list[Ticket]) -> None:
        try:
            lanes.start(tickets)
        except torch.AcceleratorError:
            raise
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError) and lanes.count > LEAST:
                raise
            lanes.leave(tickets)
            self._blame(lanes, tickets, error)

    def _blame(self, lanes: Lanes, tickets: list[Ticket], error: Exception) -> None:
        """Fail the ticket whose cohort failed; draw each of several again, in a cohort alone."""
        if len(tickets) == 1:
            tickets[0].settle(error)
        else:
            for ticket in tickets:
                ticket.alone = True
            lanes.put_back(tickets)

    def _shrink(self, lanes: Lanes, error: Exception) -> None:
        """Draw what stood in the lanes again in half as many; with the fewest, fail it."""
        tickets = lanes.give_up(lanes.cohorts)
        error = error.with_traceback(None)  # whose frames hold the failed call's tensors
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if lanes.count == LEAST:
            for ticket in tickets:
                ticket.settle(error)
            return
        lanes.put_back(tickets)
        lanes.count = max(LEAST, lanes.count // 2)
        self._count.shrunk.append(f"{lanes.count} lanes ({text})")

    def _stop(self, reason: ModelError) -> None:
        """Take no more requests; end those that are unfinished, which is no fault of theirs."""
        with self._changed:
            if not self._closed:
                self._closed, self._reason = True, reason
        self._finisher.close()
        for ticket in list(self._open):
            if self._cancelled:
                ticket.future.cancel()
            ticket.settle(reason)

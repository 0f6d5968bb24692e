"""The lanes of one shape: who waits for them, which cohorts stand in them, one tick at a time.

A tick is one UNet call of exactly `count` rows; where nobody in it needs its exact bits, of the
smallest power of two that holds those who are there. Between ticks finished requests leave and
waiting ones join. What each request will take of the lanes is known from its first tick to its
last, so a request joins only where all its ticks have room.
"""

import copy
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sdbatch.engine.cohort import Cohort, Ticket
from sdbatch.models.schedulers import make_scheduler
from sdbatch.models.sd1.family import StableDiffusion1, padded

LEAST = 2  # lanes: a guided image
OVERTAKING = 32  # lanes' worth of later requests that may overtake one
SCHEDULERS = 256  # kept ready: some take 0.1 s to set up


class Schedulers:
    """Fresh diffusers schedulers by kind, copied from ones that were set up once."""

    def __init__(self, model_config: dict[str, Any]) -> None:
        self._config = model_config
        self._ready: dict[tuple[str, int], Any] = {}

    def make(self, sampler: str, num_inference_steps: int) -> Any:
        """Return a scheduler at its start; raises ValueError where there is none."""
        kind = (sampler, num_inference_steps)
        if kind not in self._ready:
            if len(self._ready) >= SCHEDULERS:
                self._ready.pop(next(iter(self._ready)))
            self._ready[kind] = make_scheduler(sampler, self._config, num_inference_steps)
        return copy.deepcopy(self._ready[kind])

    def ticks(self, sampler: str, num_inference_steps: int) -> int:
        """Return how many UNet calls a request of the kind takes."""
        kind = (sampler, num_inference_steps)
        if kind not in self._ready:
            self.make(*kind)
        return len(self._ready[kind].timesteps)


class Lanes:
    """The lanes of one shape. Belongs to the engine's thread."""

    def __init__(self, sd: StableDiffusion1, schedulers: Schedulers, count: int) -> None:
        self.count = count
        self.cohorts: list[Cohort] = []
        self._sd = sd
        self._schedulers = schedulers
        # By kind, and within it by when two lanes are needed: all of a queue fit, or none does.
        self._waiting: dict[Any, deque[Ticket]] = {}
        self._waiting_count = 0
        self._admitted = 0
        self._taken: NDArray[np.int64] = np.zeros(0, np.int64)  # lanes taken, from the next tick on

    @property
    def busy(self) -> bool:
        """Tell whether a request waits or is drawn here."""
        return bool(self._waiting or self.cohorts)

    def put(self, ticket: Ticket) -> None:
        """Let `ticket`, whose ticks are known, wait."""
        ticket.overtaken_at = self._admitted + self._waiting_count + OVERTAKING * self.count
        self._enqueue(ticket).append(ticket)

    def put_back(self, tickets: list[Ticket]) -> None:
        """Let tickets that were in lanes wait again, before all others."""
        for ticket in tickets:
            ticket.overtaken_at = ticket.fewest = 0
            self._enqueue(ticket).appendleft(ticket)

    def drop_cancelled(self) -> None:
        """Free the lanes of requests that were cancelled."""
        dropped = [cohort.drop_cancelled() for cohort in self.cohorts]
        if any(dropped):
            self.cohorts = [cohort for cohort in self.cohorts if cohort.alive]
            self._count_taken()

    def admit(self) -> list[list[Ticket]]:
        """Take waiting tickets into free lanes, a list for each cohort that they will make.

        Longest first, as a long one that begins late leaves lanes empty at the end; but one that
        too many have overtaken goes before all, and then nobody takes the lanes that it needs.
        """
        taken: dict[Any, list[Ticket]] = {}
        free = self.count - (int(self._taken[0]) if len(self._taken) else 0)
        for key in self._order() if free else ():
            queue = self._waiting[key]
            while queue and (queue[0].future.cancelled() or self._fits(queue[0])):
                ticket = self._take(key)
                if ticket.future.cancelled():
                    ticket.settle(CancelledError())
                    continue
                self._occupy(ticket.lanes())
                kind = (ticket.request.kind, id(ticket) if ticket.alone else None)
                taken.setdefault(kind, []).append(ticket)
                self._admitted += 1
            if queue and self._is_overdue(queue[0]):
                break
        return list(taken.values())

    def start(self, tickets: list[Ticket]) -> None:
        """Make a cohort of admitted tickets; raises what its scheduler or text raises."""
        request = tickets[0].request
        scheduler = self._schedulers.make(request.sampler, request.num_inference_steps)
        waiting = (ticket for key in self._order() for ticket in self._waiting[key])
        self.cohorts.append(Cohort(tickets, self._sd, scheduler, waiting))

    def leave(self, tickets: list[Ticket]) -> None:
        """Give back the lanes of admitted tickets that made no cohort."""
        for ticket in tickets:
            self._taken[: ticket.ticks] -= ticket.lanes()

    def tick(self) -> tuple[int, int, list[tuple[Cohort, Exception]]]:
        """Advance all cohorts by one UNet call.

        Returns:
            Its rows, how many of them were not padding, and the cohorts that failed, with why.
        """
        faults: list[tuple[Cohort, Exception]] = []
        lanes = [(cohort, cohort.lanes) for cohort in self.cohorts]
        inputs = [_guarded(faults, cohort, cohort.model_input) for cohort, _ in lanes]
        lanes = [one for one, latents in zip(lanes, inputs, strict=True) if latents is not None]
        count, filled = self._rows(lanes) if lanes else 0, 0
        if lanes:
            noise = self._sd.denoise(
                padded(torch.cat([x for x in inputs if x is not None]), count),
                padded(torch.cat([cohort.timesteps() for cohort, _ in lanes]), count),
                padded(torch.cat([cohort.context for cohort, _ in lanes]), count),
            )
        for cohort, rows in lanes:
            _guarded(faults, cohort, partial(cohort.advance, noise[filled : filled + rows]))
            filled += rows
        self._taken = self._taken[1:]
        return count, filled, faults

    def _rows(self, lanes: list[tuple[Cohort, int]]) -> int:
        """Return the rows of a UNet call of these cohorts, and let their requests know."""
        tickets = [cohort.tickets[i] for cohort, _ in lanes for i in cohort.alive]
        count = self.count
        if not any(ticket.exact for ticket in tickets):
            needed = max(LEAST, sum(rows for _, rows in lanes))
            count = min(count, 1 << (needed - 1).bit_length())
        for ticket in tickets:
            ticket.fewest = min(ticket.fewest or count, count)
        return count

    def take_done(self) -> Iterator[tuple[Ticket, torch.Tensor]]:
        """Take the finished requests out of their lanes, each with its latents (C, h, w)."""
        done = [cohort for cohort in self.cohorts if cohort.done]
        self.cohorts = [cohort for cohort in self.cohorts if not cohort.done]
        for cohort in done:
            for i in cohort.alive:
                yield cohort.tickets[i], cohort.latents[i]

    def give_up(self, cohorts: list[Cohort]) -> list[Ticket]:
        """Take `cohorts` out of their lanes unfinished; return their requests."""
        self.cohorts = [cohort for cohort in self.cohorts if cohort not in cohorts]
        self._count_taken()
        return [cohort.tickets[i] for cohort in cohorts for i in cohort.alive]

    def _enqueue(self, ticket: Ticket) -> deque[Ticket]:
        self._waiting_count += 1
        key = (ticket.request.kind, ticket.request.guided_ticks(ticket.ticks))
        return self._waiting.setdefault(key, deque())

    def _take(self, key: Any) -> Ticket:
        ticket = self._waiting[key].popleft()
        self._waiting_count -= 1
        if not self._waiting[key]:
            del self._waiting[key]
        return ticket

    def _order(self) -> list[Any]:
        heads = {key: queue[0] for key, queue in self._waiting.items()}
        # those of a kind stand together, and so join one cohort
        order = sorted(heads, key=lambda key: (-heads[key].ticks, heads[key].request.kind))
        oldest = min(heads, key=lambda key: heads[key].overtaken_at, default=None)
        if oldest is not None and self._is_overdue(heads[oldest]):
            order.remove(oldest)
            order.insert(0, oldest)
        return order

    def _is_overdue(self, ticket: Ticket) -> bool:
        return self._admitted >= ticket.overtaken_at

    def _fits(self, ticket: Ticket) -> bool:
        lanes = ticket.lanes()
        over = min(len(lanes), len(self._taken))
        return bool((self._taken[:over] + lanes[:over]).max(initial=0) <= self.count)

    def _occupy(self, lanes: NDArray[np.int64]) -> None:
        busy = np.zeros(max(len(lanes), len(self._taken)), np.int64)
        busy[: len(self._taken)] = self._taken
        busy[: len(lanes)] += lanes
        self._taken = busy

    def _count_taken(self) -> None:
        """Work out anew which lanes are taken when."""
        self._taken = np.zeros(0, np.int64)
        for cohort in self.cohorts:
            self._occupy(cohort.plan())


def _guarded(
    faults: list[tuple[Cohort, Exception]], cohort: Cohort, call: Callable[[], Any]
) -> Any:
    """Call a method of `cohort`; what it raises is its rows' fault, unless the device's."""
    try:
        return call()
    except (torch.AcceleratorError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # noqa: BLE001  of this cohort's rows
        faults.append((cohort, error))
        return None

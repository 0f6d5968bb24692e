"""The lanes of one shape: the requests that wait for them, the cohorts in them, tick by tick.

A tick is one denoiser call of exactly `count` rows; if no request in it needs its exact bits, of
the smallest power of two that holds them. Between ticks finished requests leave and waiting ones
join. The lanes that a request takes are known from its first tick to its last, so a request joins
only where all its ticks have room. Requests with a `cache_interval` N join only before a whole
call. So all whole calls of their rows coincide, at every Nth step of each row.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sdbatch.engine.clock import Account
from sdbatch.engine.cohort import Cohort, Ticket
from sdbatch.engine.family import Conditions, Family
from sdbatch.engine.limits import LEAST_LANES

OVERTAKING = 32  # lanes' worth of later requests that may overtake a request
Attempt = Callable[[Cohort, Callable[[], Any]], Any]


class Lanes:
    """The lanes of one shape. Belongs to the engine's thread."""

    def __init__(self, family: Family, count: int) -> None:
        self.count = count
        self.least = family.limits.image_lanes  # which an image needs
        self.cohorts: list[Cohort] = []
        self.account = Account()
        self.gave_way_at: float | None = None  # clock time since when others go first
        self._family = family
        # By kind, and within it by when two lanes are needed: all of a queue fit, or none does.
        self._waiting: dict[Any, deque[Ticket]] = {}
        self._waiting_count = 0
        self._suspects: deque[Ticket] = deque()  # each is drawn with no other in the lanes
        self._admitted = 0
        self._taken: NDArray[np.int64] = np.zeros(0, np.int64)  # lanes taken, from the next tick on

    @property
    def busy(self) -> bool:
        """Tell whether a request waits here or is being drawn."""
        return bool(self._waiting or self._suspects or self.cohorts)

    @property
    def waiting(self) -> int:
        """Return how many requests wait here."""
        return self._waiting_count + len(self._suspects)

    @property
    def fills_rows(self) -> bool:
        """Tell whether a tick would leave no row empty: without exact requests it has fewer."""
        taken = int(self._taken[0]) if len(self._taken) else 0
        if taken + self.least * self.waiting >= self.count:
            return True
        return self.busy and not self._has_exact

    @property
    def _has_exact(self) -> bool:
        drawn = (ticket for cohort in self.cohorts for ticket in cohort.tickets)
        return any(ticket.exact for ticket in chain(drawn, self._suspects, *self._waiting.values()))

    def put(self, ticket: Ticket) -> None:
        """Queue `ticket`, whose ticks are known."""
        ticket.overdue_at = self._admitted + self._waiting_count + OVERTAKING * self.count
        self._enqueue(ticket).append(ticket)

    def put_back(self, tickets: list[Ticket]) -> None:
        """Queue tickets again that were in lanes, before all others."""
        for ticket in tickets:
            ticket.overdue_at = ticket.fewest_rows = 0
            if ticket.suspect:
                self._suspects.append(ticket)
            else:
                self._enqueue(ticket).appendleft(ticket)

    def drop_cancelled(self) -> None:
        """Release the lanes of cancelled requests; before a whole call if calls reuse a cache."""
        if self._reusing:
            return
        dropped = [cohort.drop_cancelled() for cohort in self.cohorts]
        if any(dropped):
            self.cohorts = [cohort for cohort in self.cohorts if cohort.alive]
            self._count_taken()

    def admit(self) -> list[list[Ticket]]:
        """Move waiting tickets into free lanes; return a list for each cohort to make of them.

        Longest first, as a long request that begins late leaves lanes empty at the end. But an
        overdue request goes first, and no other takes the lanes that it waits for.
        """
        if self._reusing:
            return []
        if self._suspects:
            return self._admit_suspect()
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
                kind = (ticket.kind, id(ticket) if ticket.alone else None)
                taken.setdefault(kind, []).append(ticket)
                self._admitted += 1
            if queue and self._is_overdue(queue[0]):
                break
        return list(taken.values())

    def _admit_suspect(self) -> list[list[Ticket]]:
        """Move a suspect into the lanes if they are empty; return a list as `admit` does."""
        if self.cohorts:
            return []
        ticket = self._suspects.popleft()
        self._occupy(ticket.lanes())
        return [[ticket]]

    def start(self, tickets: list[Ticket]) -> None:
        """Make a cohort of admitted tickets; raises what its scheduler or text raises."""
        waiting = (ticket for key in self._order() for ticket in self._waiting[key])
        self.cohorts.append(Cohort(tickets, self._family, waiting))

    def leave(self, tickets: list[Ticket]) -> None:
        """Release the lanes of admitted tickets whose cohort could not start."""
        for ticket in tickets:
            self._taken[: ticket.ticks] -= ticket.lanes()

    def tick(self, attempt: Attempt) -> tuple[int, int]:
        """Advance all cohorts by one denoiser call; return its rows, and those without padding.

        Args:
            attempt: calls a cohort's own step, and returns None if that fails.
        """
        inputs = {cohort: attempt(cohort, cohort.model_input) for cohort in self.cohorts}
        cohorts = [(cohort, cohort.lanes) for cohort in self.cohorts if inputs[cohort] is not None]
        if not cohorts:
            return 0, 0
        rows, filled = self._batch_rows(cohorts), 0
        cache = None
        if cohorts[0][0].cache_interval > 1:
            cache = joined([cohort.cache for cohort, _ in cohorts], rows)
        answer = self._family.denoise(
            padded(torch.cat([inputs[cohort] for cohort, _ in cohorts]), rows),
            padded(torch.cat([cohort.timesteps() for cohort, _ in cohorts]), rows),
            joined([cohort.conditions for cohort, _ in cohorts], rows),
            cache,
            first_lanes([cohort for cohort, _ in cohorts]),
        )
        for cohort, lanes in cohorts:
            if cache is not None:
                cohort.cache = {name: kept[filled : filled + lanes] for name, kept in cache.items()}
            attempt(cohort, partial(cohort.advance, answer[filled : filled + lanes]))
            filled += lanes
        self._taken = self._taken[1:]
        return rows, filled

    def _batch_rows(self, cohorts: list[tuple[Cohort, int]]) -> int:
        """Return the rows of a denoiser call for these cohorts; record it in their tickets."""
        tickets = [cohort.tickets[i] for cohort, _ in cohorts for i in cohort.alive]
        rows = self.count
        if not any(ticket.exact for ticket in tickets):
            needed = max(LEAST_LANES, sum(lanes for _, lanes in cohorts))
            rows = min(rows, 1 << (needed - 1).bit_length())
        for ticket in tickets:
            ticket.fewest_rows = min(ticket.fewest_rows or rows, rows)
        return rows

    def take_done(self) -> Iterator[tuple[Ticket, torch.Tensor]]:
        """Remove the finished requests from the lanes; yield each with its latents (C, h, w)."""
        done = [cohort for cohort in self.cohorts if cohort.done]
        self.cohorts = [cohort for cohort in self.cohorts if not cohort.done]
        for cohort in done:
            for i in cohort.alive:
                yield cohort.tickets[i], cohort.latents[i]

    def give_up(self, cohorts: list[Cohort]) -> list[Ticket]:
        """Remove unfinished `cohorts` from the lanes; return their tickets."""
        self.cohorts = [cohort for cohort in self.cohorts if cohort not in cohorts]
        self._count_taken()
        return [cohort.tickets[i] for cohort in cohorts for i in cohort.alive]

    @property
    def _reusing(self) -> bool:
        """Tell whether the next denoiser call reuses what an earlier one computed."""
        return any(cohort.cache for cohort in self.cohorts)

    def _enqueue(self, ticket: Ticket) -> deque[Ticket]:
        self._waiting_count += 1
        key = (ticket.kind, ticket.guided().tobytes())
        return self._waiting.setdefault(key, deque())

    def _take(self, key: Any) -> Ticket:
        ticket = self._waiting[key].popleft()
        self._waiting_count -= 1
        if not self._waiting[key]:
            del self._waiting[key]
        return ticket

    def _order(self) -> list[Any]:
        heads = {key: queue[0] for key, queue in self._waiting.items()}
        # requests of one kind are neighbours in this order, and so join one cohort
        order = sorted(heads, key=lambda key: (-heads[key].ticks, heads[key].kind))
        oldest = min(heads, key=lambda key: heads[key].overdue_at, default=None)
        if oldest is not None and self._is_overdue(heads[oldest]):
            order.remove(oldest)
            order.insert(0, oldest)
        return order

    def _is_overdue(self, ticket: Ticket) -> bool:
        return self._admitted >= ticket.overdue_at

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
        """Compute again which lanes are taken when."""
        self._taken = np.zeros(0, np.int64)
        for cohort in self.cohorts:
            self._occupy(cohort.lanes_ahead())


def first_lanes(cohorts: list[Cohort]) -> list[int]:
    """Return for each lane the first lane of its image, as Family.denoise takes them."""
    firsts: list[int] = []
    for cohort in cohorts:
        before = len(firsts)
        firsts += [before + first for first in cohort.first_lanes]
    return firsts


def joined(parts: list[Conditions], count: int) -> Conditions:
    """Return the named rows of all parts, one part after the other, padded to `count` rows."""
    return {name: padded(torch.cat([part[name] for part in parts]), count) for name in parts[0]}


def padded(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Return `rows` with rows of zeros appended, `count` in all."""
    missing = count - len(rows)
    return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing else rows

"""What a fault means: the end of the engine, fewer lanes, or the failure of one request."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from sdbatch.engine.cohort import Cohort, Ticket
from sdbatch.engine.lanes import Lanes
from sdbatch.engine.limits import LEAST_LANES
from sdbatch.engine.request import Usage
from sdbatch.errors import one_line

Result = TypeVar("Result")


class FaultPolicy:
    """Decides on every exception of a round. A failed device always ends the engine.

    - A call over all lanes fails, as a rule for lack of memory: half the lanes, same requests.
    - A cohort's own step fails: each of its requests is drawn again alone.
    - A request fails alone, or in the fewest lanes: its future gets the exception.
    """

    def __init__(self, usage: Usage) -> None:
        self._usage = usage
        self._failed: list[tuple[Cohort, Exception]] = []

    def guard(self, lanes: Lanes, call: Callable[[], None]) -> None:
        """Handle what `call` raises, and the cohorts whose steps failed in it."""
        try:
            call()
            for cohort, error in self._failed:
                self._retry_alone(lanes, lanes.give_up([cohort]), error)
        except torch.AcceleratorError:
            raise
        except Exception as error:  # noqa: BLE001  out of memory, as a rule
            self._halve(lanes, error)
        finally:
            self._failed.clear()

    def attempt(self, cohort: Cohort, call: Callable[[], Any]) -> Any:
        """Return the result of a cohort's own step; None if it fails, which `guard` handles."""
        try:
            return call()
        except (torch.AcceleratorError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # noqa: BLE001  caused by this cohort's requests
            self._failed.append((cohort, error))
            return None

    def start(self, lanes: Lanes, tickets: list[Ticket]) -> None:
        """Start a cohort of admitted requests."""
        try:
            lanes.start(tickets)
        except torch.AcceleratorError:
            raise
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError) and lanes.count > LEAST_LANES:
                raise
            lanes.leave(tickets)
            self._retry_alone(lanes, tickets, error)

    def decode(self, call: Callable[[], Result]) -> Result | Exception:
        """Return the result of a decoder call, or what it raises."""
        try:
            return call()
        except torch.AcceleratorError:
            raise
        except Exception as error:  # noqa: BLE001  repeated in smaller groups
            return error.with_traceback(None)  # its frames hold the failed call's tensors

    def record(self, reduced_to: str, error: Exception) -> None:
        """Record a reduction after a fault."""
        self._usage.shrunk.append(f"{reduced_to} ({type(error).__name__}: {one_line(error, 200)})")

    def _retry_alone(self, lanes: Lanes, tickets: list[Ticket], error: Exception) -> None:
        if len(tickets) == 1:
            tickets[0].settle(error)
            return
        for ticket in tickets:
            ticket.alone = True
        lanes.put_back(tickets)

    def _halve(self, lanes: Lanes, error: Exception) -> None:
        """Draw the requests in the lanes again in half as many; with the fewest, fail them."""
        tickets = lanes.give_up(lanes.cohorts)
        error = error.with_traceback(None)  # its frames hold the failed call's tensors
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if lanes.count == LEAST_LANES:
            for ticket in tickets:
                ticket.settle(error)
            return
        lanes.put_back(tickets)
        lanes.count = max(LEAST_LANES, lanes.count // 2)
        self.record(f"{lanes.count} lanes", error)

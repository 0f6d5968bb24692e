"""What a fault means: the end of the engine, fewer lanes, or the failure of one request."""

import re
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from sdbatch.engine import cuda
from sdbatch.engine.cohort import Cohort, Ticket
from sdbatch.engine.lanes import Lanes
from sdbatch.engine.request import Usage
from sdbatch.errors import ModelError, one_line

Result = TypeVar("Result")
# What CUDA, cuDNN, cuBLAS, Triton and torch's CPU allocator say for lack of memory where they raise
# no OutOfMemoryError. cuDNN tries one algorithm after the other, and then finds "no engine".
_NO_MEMORY = re.compile(
    "out of memory|not enough memory|can't allocate memory|alloc(ation)?_failed|bad_alloc"
    "|unable to find an engine|unable to find a valid cudnn algorithm",
    re.IGNORECASE,
)


def is_lack_of_memory(error: BaseException) -> bool:
    """Tell whether a call failed because the device or the machine has too little free memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None


def cannot_draw(error: BaseException) -> ModelError:
    """Return the error of an engine whose calls fail whatever it draws."""
    paragraph = str(error).strip().split("\n\n")[0]  # torch's compiler adds how to debug it
    text = f"{type(error).__name__}: {one_line(paragraph, 300)}"
    if is_lack_of_memory(error):
        return ModelError(
            f"The device has too little memory for an image ({text}). Set a smaller height and "
            f"width, or use a device with more memory."
        )
    return ModelError(
        f"The model cannot draw on this device ({text}). Correct the cause, or set engine.compile "
        f"to false, engine.rewrites to auto, or another engine.dtype."
    )


class FaultPolicy:
    """Decides on every exception of a round. A failed device always ends the engine.

    - A call over all lanes fails for lack of memory: half the lanes, same requests.
    - It fails for another reason, such as a kernel: the engine ends if it can draw nothing.
      Otherwise a request may be the cause, so each is drawn again with nothing else in the lanes.
    - A cohort's own step fails: each of its requests is drawn again in its own cohort.
    - A request fails alone, or in the fewest lanes: its future gets the exception.

    Args:
        usage: of the engine.
        check_engine: raises a ModelError if the engine can draw nothing, after an exception.
    """

    def __init__(self, usage: Usage, check_engine: Callable[[Exception], None]) -> None:
        self._usage = usage
        self._check_engine = check_engine
        self._failed: list[tuple[Cohort, Exception]] = []

    def guard(self, lanes: Lanes, call: Callable[[], None]) -> None:
        """Handle what `call` raises, and the cohorts whose steps failed in it."""
        try:
            call()
            for cohort, error in self._failed:
                self._retry_alone(lanes, lanes.give_up([cohort]), error)
        except Exception as error:
            if _is_failed_device(error):
                raise
            self._retry_all(lanes, error.with_traceback(None))  # its frames hold the tensors
        finally:
            self._failed.clear()

    def attempt(self, cohort: Cohort, call: Callable[[], Any]) -> Any:
        """Return the result of a cohort's own step; None if it fails, which `guard` handles."""
        try:
            return call()
        except Exception as error:
            if _is_failed_device(error) or is_lack_of_memory(error):
                raise
            self._failed.append((cohort, error))
            return None

    def start(self, lanes: Lanes, tickets: list[Ticket]) -> None:
        """Start a cohort of admitted requests."""
        try:
            lanes.start(tickets)
        except Exception as error:
            if _is_failed_device(error):
                raise
            if is_lack_of_memory(error) and lanes.count > lanes.least:
                raise
            lanes.leave(tickets)
            self._retry_alone(lanes, tickets, error)

    def decode(self, call: Callable[[], Result]) -> Result | Exception:
        """Return the result of a decoder call, or what it raises."""
        try:
            return call()
        except Exception as error:
            if _is_failed_device(error):
                raise
            if not is_lack_of_memory(error):
                self._check_engine(error)
            return error.with_traceback(None)  # its frames hold the failed call's tensors

    def halve(self, lanes: Lanes, error: Exception) -> None:
        """Halve the lanes for lack of memory, and release what torch caches."""
        cuda.release_cached_memory()
        lanes.count = max(lanes.least, lanes.count // 2)
        self.record(f"{lanes.count} lanes", error)

    def record(self, reduced_to: str, error: Exception) -> None:
        """Record a reduction after a fault."""
        self._usage.shrunk.append(f"{reduced_to} ({type(error).__name__}: {one_line(error, 200)})")

    def _retry_alone(self, lanes: Lanes, tickets: list[Ticket], error: Exception) -> None:
        """Draw each request of a cohort again in its own cohort; a single one fails."""
        if len(tickets) == 1:
            tickets[0].settle(error)
            return
        for ticket in tickets:
            ticket.alone = True
        lanes.put_back(tickets)

    def _retry_all(self, lanes: Lanes, error: Exception) -> None:
        """Draw the requests in the lanes again: in half as many, or each with no other in them."""
        tickets = lanes.give_up(lanes.cohorts)
        no_memory = is_lack_of_memory(error)
        if not no_memory:
            self._check_engine(error)
        if lanes.count == lanes.least if no_memory else len(tickets) == 1:
            for ticket in tickets:
                ticket.settle(error)
            return
        for ticket in tickets:
            ticket.suspect |= not no_memory
        lanes.put_back(tickets)
        if no_memory:
            self.halve(lanes, error)


def _is_failed_device(error: Exception) -> bool:
    """Tell whether no later call on the device can succeed."""
    if isinstance(error, ModelError):
        return True
    return isinstance(error, torch.AcceleratorError) and not is_lack_of_memory(error)

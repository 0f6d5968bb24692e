"""Requests to an object store that fail for a moment are sent again, up to a budget of time."""

import logging
import random
import time
from collections.abc import Callable
from typing import TypeVar

from sdbatch.urls import without_secrets

BUDGET_SECONDS = 120.0  # from the first attempt; then the store counts as gone
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 20.0

_T = TypeVar("_T")
_log = logging.getLogger(__name__)


def try_again(
    where: str,
    request: Callable[[], _T],
    passes: Callable[[Exception], bool],
    budget: float | None = None,
) -> _T:
    """Return what `request` returns; send it again while it fails with what passes by itself.

    The pauses double, and each is a random part of that: many processes do not come back at once.

    Args:
        where: the file, for the log.
        request: may be sent twice without harm.
        passes: tells whether an error does.
        budget: seconds from the first attempt on; default: BUDGET_SECONDS.
    """
    began, pause = time.monotonic(), FIRST_PAUSE_SECONDS
    budget = BUDGET_SECONDS if budget is None else budget
    while True:
        try:
            return request()
        except Exception as error:
            wait = pause * random.uniform(0.5, 1)
            if not passes(error) or time.monotonic() - began + wait > budget:
                raise
            text = without_secrets(f"{where}: {type(error).__name__}: {error}")
            _log.warning("%s. Trying again in %.1f s.", text, wait)
        time.sleep(wait)
        pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

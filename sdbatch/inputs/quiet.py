"""Pillow's warnings, which say nothing that an error does not, kept from the process's stderr."""

import threading
import warnings
from types import TracebackType


class _Quiet:
    """Ignores the warnings of Pillow while any thread is inside.

    `warnings.catch_warnings` exchanges the filters of the whole process, so the first thread
    that enters does it, and the last one that leaves takes it back.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._filters = warnings.catch_warnings()
                self._filters.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\.")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._filters.__exit__(kind, error, traceback)


QUIET = _Quiet()

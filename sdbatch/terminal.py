"""The terminal of a command: it shows the progress of a run, and nothing that Ray prints.

Nor a secret: a traceback is printed without those of URLs.
"""

import contextlib
import logging
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING

from sdbatch import retention
from sdbatch.urls import without_secrets

NOTICE_SECONDS = 10.0  # between two notices of one kind, such as a request that is sent again

if TYPE_CHECKING:
    from sdbatch.report.progress import Display


def display(out: IO[str], as_json: bool) -> "Display":
    """Return the display of progress on `out`: JSON, a live bar on a terminal, or plain lines."""
    from sdbatch.report.progress import BarDisplay, JsonDisplay, LineDisplay

    if as_json:
        return JsonDisplay(out)
    return BarDisplay(out) if out.isatty() else LineDisplay(out)


def print_traceback(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Print the traceback of an error that no command expects, without secrets."""
    text = "".join(traceback.format_exception(kind, error, trace))
    sys.stderr.write(without_secrets(text))


@contextlib.contextmanager
def quiet_terminal() -> Iterator[tuple[IO[str], IO[str], str]]:
    """Redirect what Ray and its processes print to a log file.

    Yields the real stdout, the real stderr, and the path of the log.

    By file descriptor: Ray's C++ code bypasses sys.stdout and ignores Ray's own settings. sdbatch's
    own warnings, such as what a run waits for, go to the real stderr.
    """
    folder = retention.log_folder()
    for old in retention.of_old_runs(Path(folder).iterdir()):
        old.unlink(missing_ok=True)
    log_descriptor, log = tempfile.mkstemp(prefix="", suffix=".log", dir=folder)
    retention.lock(log_descriptor)
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(1), os.dup(2)]
    out = os.fdopen(os.dup(saved[0]), "w", encoding="utf-8")
    try:
        os.dup2(log_descriptor, 1)
        os.dup2(log_descriptor, 2)
        with os.fdopen(os.dup(saved[1]), "w", encoding="utf-8") as err, _notices(err):
            yield out, err, log
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for copy, original in zip(saved, (1, 2), strict=True):
            os.dup2(copy, original)
            os.close(copy)
        os.close(log_descriptor)
        with contextlib.suppress(OSError):  # nobody reads the pipe any more: `| head`
            out.close()


@contextlib.contextmanager
def _notices(err: IO[str]) -> Iterator[None]:
    """Print the warnings of sdbatch's own modules on `err`, and all that they note in the log."""
    shown, kept = logging.StreamHandler(err), logging.StreamHandler(sys.stderr)
    shown.setLevel(logging.WARNING)
    shown.addFilter(_Seldom())
    logger = logging.getLogger("sdbatch")
    level = logger.level
    logger.setLevel(logging.INFO)
    for handler in (shown, kept):
        logger.addHandler(handler)
    try:
        yield
    finally:
        for handler in (shown, kept):
            logger.removeHandler(handler)
        logger.setLevel(level)


class _Seldom(logging.Filter):
    """Admits a notice of each kind every NOTICE_SECONDS."""

    def __init__(self) -> None:
        super().__init__()
        self._due: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether a notice is shown."""
        now = time.monotonic()
        shown = now >= self._due.get(record.msg, now)
        if shown:
            self._due[record.msg] = now + NOTICE_SECONDS
        return shown

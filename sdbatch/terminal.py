"""The terminal of a command: it shows the progress of a run, and nothing that Ray prints.

Nor a secret: a traceback is printed without those of URLs.
"""

import contextlib
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from types import TracebackType
from typing import IO, TYPE_CHECKING

from sdbatch.urls import without_secrets

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
def quiet_terminal() -> Iterator[tuple[IO[str], str]]:
    """Redirect what Ray and its processes print to a log file; yield the real stdout and the log.

    By file descriptor: Ray's C++ code bypasses sys.stdout and ignores Ray's own settings.
    """
    log_descriptor, log = tempfile.mkstemp(prefix="sdbatch-", suffix=".log")
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(1), os.dup(2)]
    out = os.fdopen(os.dup(saved[0]), "w", encoding="utf-8")
    try:
        os.dup2(log_descriptor, 1)
        os.dup2(log_descriptor, 2)
        yield out, log
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for copy, original in zip(saved, (1, 2), strict=True):
            os.dup2(copy, original)
            os.close(copy)
        os.close(log_descriptor)
        with contextlib.suppress(OSError):  # nobody reads the pipe any more: `| head`
            out.close()

"""What a command's terminal shows: the progress of a run, and nothing that Ray prints."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from sdbatch.report.progress import Display


def display(out: IO[str], as_json: bool) -> "Display":
    """Return how progress is shown on `out`: as JSON, live on a terminal, or as plain lines."""
    from sdbatch.report.progress import Bar, JsonLines, Lines

    if as_json:
        return JsonLines(out)
    return Bar(out) if out.isatty() else Lines(out)


@contextlib.contextmanager
def quiet_terminal() -> Iterator[tuple[IO[str], str]]:
    """Send what Ray and its processes print to a log file; yield the true stdout and the log.

    By file descriptor: Ray's C++ parts print past Python, and past every setting of Ray's.
    """
    number, log = tempfile.mkstemp(prefix="sdbatch-", suffix=".log")
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    out = os.fdopen(os.dup(kept[0]), "w", encoding="utf-8")
    try:
        os.dup2(number, 1)
        os.dup2(number, 2)
        yield out, log
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for fd, true in zip(kept, (1, 2), strict=True):
            os.dup2(fd, true)
            os.close(fd)
        os.close(number)
        out.close()

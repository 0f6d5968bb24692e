"""A command that is spoken for: a parent process says so when the command dies without a word.

Ray ends a driver from C++ when its raylet or its head dies, and nothing of Python runs then.
"""

import atexit
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
MOST_STOPS = 3  # signals to stop; the next one kills the command
_PR_SET_PDEATHSIG = 1
_SPOKEN = b"\0"


class Watched:
    """The command's side of the pipe to its parent."""

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe
        atexit.register(self.note, _SPOKEN)

    def note(self, text: bytes) -> None:
        """Send the parent something to say if this process dies."""
        os.write(self._pipe, text)

    def exit(self, code: int) -> NoReturn:
        """End the process at once, so that no thread of Ray's that goes on can print or fail."""
        self.note(_SPOKEN)
        os._exit(code)


def watch(on_silence: Callable[[int, str, str], None]) -> Watched | None:
    """Go on in a child process; the parent waits for it and exits as it does.

    Signals to stop reach the child once each. It dies with its parent. Nothing is watched where a
    process cannot be forked safely: when other threads run, or without a fork.

    Args:
        on_silence: called in the parent with the child's process, how it ended, and what it noted,
            if it ended without its exit code being meant; the command fails then, with code 1.
    """
    if threading.active_count() > 1 or not hasattr(os, "fork"):
        return None
    read, write = os.pipe()
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        os.close(read)
        os.setpgid(0, 0)  # else a terminal sends Ctrl-C to both
        _die_with(parent)
        return Watched(write)
    os.close(write)
    status = _wait(child)
    with os.fdopen(read, "rb") as pipe:
        noted = pipe.read()
    code = os.waitstatus_to_exitcode(status)
    if not noted.endswith(_SPOKEN):
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        on_silence(child, how, noted.decode())
    if code < 0 or not noted.endswith(_SPOKEN):  # also when a signal came after its last word
        code = 1
    sys.stdout.flush()
    os._exit(code)  # what the child has done at its exit is not done twice


def _wait(child: int) -> int:
    """Return the child's wait status; pass on the signals to stop."""
    stops = 0

    def stop(number: int, _: object) -> None:
        nonlocal stops
        stops += 1
        os.kill(child, number if stops <= MOST_STOPS else signal.SIGKILL)

    for number in _STOPS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, stop)
    return os.waitpid(child, 0)[1]


def _die_with(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it has died already
            os._exit(1)

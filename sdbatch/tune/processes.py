"""A call in another process, which ends when its time is over."""

import multiprocessing
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from sdbatch.errors import one_line

_T = TypeVar("_T")


class CallError(Exception):
    """The call raised, took too long, or ended its process."""


def call(function: Callable[..., _T], *arguments: Any, seconds: float) -> _T:
    """Return what a function of a module returns in a new process.

    Raises:
        CallError: it did not return in time.
    """
    seconds = max(0.0, seconds)
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        if not receiver.poll(seconds):
            raise CallError(f"not done within {seconds:.0f} s; --seconds gives more time")
        error, result = receiver.recv()
    except EOFError as error:
        raise CallError("its process died") from error
    finally:
        process.kill()
        process.join()
        receiver.close()
    if error is not None:
        raise CallError(error)
    answer: _T = result
    return answer


def _answer(sender: Connection, function: Callable[..., Any], arguments: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    try:
        sender.send((None, function(*arguments)))
    except Exception as error:  # noqa: BLE001  raised again by the parent
        sender.send((f"{type(error).__name__}: {one_line(error, 160)}", None))

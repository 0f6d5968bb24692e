"""Follow a job on a cluster from here: its log, its progress, and its exit code at the end.

The log is a stream that proxies and restarts interrupt: it is resumed where it broke off, and what
is missing at the end is fetched at once. Progress comes from the output's progress.json if that is
readable from here, else from the log.
"""

import asyncio
import queue
import threading
import time
from collections.abc import Callable

from sdbatch.errors import JobError, StorageError
from sdbatch.output.progress import Heartbeat, read_heartbeat
from sdbatch.report import progress
from sdbatch.report.progress import Display
from sdbatch.storage import Store
from sdbatch.submit.jobs import Jobs, State

DETACHED = 130  # exit code after Ctrl-C, as in shells
POLL_SECONDS = 1.0
RETRY_SECONDS = 2.0  # before an interrupted log is resumed
LOST_SECONDS = 600.0  # without an answer of the cluster
COMMAND_NOT_FOUND = 127  # exit code of a shell


def follow_job(
    jobs: Jobs, name: str, store: Store, display: Display | None, echo: Callable[[str], None]
) -> int:
    """Show the job `name` until it ends; return its exit code, 1 if it has none.

    Raises:
        JobError: the cluster has not answered for LOST_SECONDS.
    """
    view = _View(store, display, echo)
    log = _LogStream(jobs, name)
    try:
        state = _wait_for_end(jobs, name, log, view)
        log.close()
        view.show_lines(log.remaining_lines())
    finally:
        log.close()
        view.close()
    return _exit_code(state, echo)


def _wait_for_end(jobs: Jobs, name: str, log: "_LogStream", view: "_View") -> State:
    last_answer = time.monotonic()
    silent = False
    while True:
        view.show_lines(log.new_lines(POLL_SECONDS))
        view.show_progress()
        try:
            state = jobs.state(name)
            last_answer, silent = time.monotonic(), False
            if state.ended:
                return state
        except JobError as error:
            if time.monotonic() - last_answer > LOST_SECONDS:
                raise JobError(
                    f"{error} There was no answer for {LOST_SECONDS / 60:.0f} minutes, but the job "
                    f"may still run. Run the same command again to follow it."
                ) from error
            if not silent:
                view.show_lines([f"the cluster does not answer, retrying ({error})"])
            silent = True


def _exit_code(state: State, echo: Callable[[str], None]) -> int:
    if state.exit_code == COMMAND_NOT_FOUND:
        echo(
            "Error: sdbatch is not installed on the cluster. Submit with --pip sdbatch, or with "
            "--image."
        )
    if state.exit_code is None:
        echo(f"Error: the job ended without an exit code, {state.message}")
    return 1 if state.exit_code is None else state.exit_code


class _View:
    """Shows a job's log and progress to the user."""

    def __init__(self, store: Store, display: Display | None, echo: Callable[[str], None]) -> None:
        self._store = store
        self._display = display
        self._echo = echo
        self._stale = self._read_heartbeat()  # of an earlier run
        self._progress_shown = False

    def show_lines(self, lines: list[str]) -> None:
        """Show lines of the log, without progress lines if progress.json is shown."""
        for line in lines:
            if not (self._progress_shown and progress.PROGRESS_LINE.match(line)):
                self.close()  # a live bar, which returns with the next progress
                self._echo(line)

    def show_progress(self) -> None:
        """Show the contents of progress.json if it is readable and from this job."""
        heartbeat = self._read_heartbeat()
        if heartbeat is None or heartbeat == self._stale or self._display is None:
            return
        self._progress_shown = True
        if heartbeat.state == "running":
            self._display.show(heartbeat.progress)

    def close(self) -> None:
        """Release the terminal."""
        if self._display is not None:
            self._display.close(None)

    def _read_heartbeat(self) -> Heartbeat | None:
        try:
            return read_heartbeat(self._store) if self._display is not None else None
        except StorageError:  # a folder that only the cluster sees, or keys are missing here
            return None


class _LogStream:
    """A job's log, line by line, over as many connections as needed."""

    def __init__(self, jobs: Jobs, name: str) -> None:
        self._jobs = jobs
        self._name = name
        self._texts: queue.Queue[str] = queue.Queue()
        self._characters = 0  # taken from the queue so far
        self._partial_line = ""  # its end arrives later
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._receive, daemon=True)
        self._thread.start()

    def new_lines(self, seconds: float) -> list[str]:
        """Return the lines that arrived, waiting up to `seconds` for the first text."""
        texts = []
        try:
            texts.append(self._texts.get(timeout=seconds))
            while True:
                texts.append(self._texts.get_nowait())
        except queue.Empty:
            pass
        self._characters += sum(map(len, texts))
        *lines, self._partial_line = (self._partial_line + "".join(texts)).split("\n")
        return lines

    def close(self) -> None:
        """End the connection."""
        self._closed.set()

    def remaining_lines(self) -> list[str]:
        """Return the lines of an ended job that have not been returned yet."""
        self._thread.join(2 * RETRY_SECONDS)
        lines = self.new_lines(0.0)
        try:
            missing = self._jobs.read_log(self._name)[self._characters :]
        except JobError as error:  # the cluster may end with its job
            missing = f"\nthe end of the log is missing ({error})"
        return [*lines, *(self._partial_line + missing).splitlines()]

    def _receive(self) -> None:
        """In a thread: queue the log, resuming where the last connection ended."""
        received = 0
        while not self._closed.is_set():
            try:
                received = asyncio.run(self._receive_once(received))
            except _DisconnectedError as error:
                received = error.received
            self._closed.wait(RETRY_SECONDS)

    async def _receive_once(self, received: int) -> int:
        """Queue the log after its first `received` characters; return the new count."""
        position = 0  # each connection begins with the log's first character
        try:
            async for text in self._jobs.tail_log(self._name):
                new = text[max(0, received - position) :]
                position += len(text)
                if new:
                    self._texts.put(new)
                    received += len(new)
        except JobError as error:
            raise _DisconnectedError(received) from error
        return received


class _DisconnectedError(Exception):
    """A connection broke after `received` characters of the log, counted over all connections."""

    def __init__(self, received: int) -> None:
        super().__init__(received)
        self.received = received

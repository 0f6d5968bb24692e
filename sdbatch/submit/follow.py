"""A job on a cluster, followed from here: its log, its progress, and its exit code at the end.

The log comes as a stream, which proxies and restarts cut: it is taken up again where it broke off,
and what is missing at the end is fetched whole. Progress is what the output's progress.json says,
where that can be read from here, and else what the log says of it.
"""

import asyncio
import queue
import threading
import time
from collections.abc import Callable

from sdbatch.errors import JobError, StorageError
from sdbatch.report import progress
from sdbatch.report.progress import Display
from sdbatch.storage import Store
from sdbatch.submit.jobs import Jobs, State

DETACHED = 130  # exit code after Ctrl-C, as shells have it
POLL_SECONDS = 1.0
AGAIN_SECONDS = 2.0  # before a broken log is taken up again
LOST_SECONDS = 600.0  # without an answer of the cluster
NO_COMMAND = 127  # exit code of a shell that does not find the command


def follow(
    jobs: Jobs, name: str, store: Store, display: Display | None, say: Callable[[str], None]
) -> int:
    """Show the job `name` until it is over; return its exit code, 1 if it has none.

    Raises:
        JobError: the cluster has not answered for LOST_SECONDS.
    """
    shown = _Shown(store, display, say)
    log = _Log(jobs, name)
    try:
        state = _until_over(jobs, name, log, shown)
        log.close()
        shown.lines(log.rest())
    finally:
        log.close()
        shown.close()
    return _exit_code(state, say)


def _until_over(jobs: Jobs, name: str, log: "_Log", shown: "_Shown") -> State:
    answered = time.monotonic()
    silent = False
    while True:
        shown.lines(log.take(POLL_SECONDS))
        shown.progress()
        try:
            state = jobs.state(name)
            answered, silent = time.monotonic(), False
            if state.over:
                return state
        except JobError as error:
            if time.monotonic() - answered > LOST_SECONDS:
                raise JobError(
                    f"{error} It has not answered for {LOST_SECONDS / 60:.0f} minutes; the job may "
                    f"go on: run the same command again to follow it."
                ) from error
            if not silent:
                shown.lines([f"the cluster does not answer, asking again ({error})"])
            silent = True


def _exit_code(state: State, say: Callable[[str], None]) -> int:
    if state.exit_code == NO_COMMAND:
        say(
            "Error: sdbatch = not found on the cluster: its machines must have it. Submit with "
            "--pip sdbatch, or with --image."
        )
    if state.exit_code is None:
        say(f"Error: job = {state.message}")
    return 1 if state.exit_code is None else state.exit_code


class _Shown:
    """What is shown of a job: its log, and its progress."""

    def __init__(self, store: Store, display: Display | None, say: Callable[[str], None]) -> None:
        self._store = store
        self._display = display
        self._say = say
        self._stale = self._read()  # of an earlier run
        self._seen = False

    def lines(self, lines: list[str]) -> None:
        """Show lines of the log, but for the progress that is shown already."""
        for line in lines:
            if not (self._seen and progress.LINE.match(line)):
                self.close()  # a bar, which comes back with the next progress
                self._say(line)

    def progress(self) -> None:
        """Show what progress.json says, if it can be read and is this job's."""
        found = self._read()
        if found is None or found == self._stale or self._display is None:
            return
        self._seen = True
        if found["state"] == "running":
            self._display.show(progress.from_json(found))

    def close(self) -> None:
        """Leave the terminal to others."""
        if self._display is not None:
            self._display.close(None)

    def _read(self) -> dict[str, object] | None:
        try:
            return progress.read(self._store) if self._display is not None else None
        except StorageError:  # a folder of the cluster's machines alone, or keys are missing here
            return None


class _Log:
    """A job's log, line by line, over as many connections as it takes."""

    def __init__(self, jobs: Jobs, name: str) -> None:
        self._jobs = jobs
        self._name = name
        self._came: queue.Queue[str] = queue.Queue()
        self._seen = 0  # characters
        self._begun = ""  # of a line whose end is to come
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._stream, daemon=True)
        self._thread.start()

    def take(self, seconds: float) -> list[str]:
        """Wait so long at most, and return the lines that came."""
        texts = []
        try:
            texts.append(self._came.get(timeout=seconds))
            while True:
                texts.append(self._came.get_nowait())
        except queue.Empty:
            pass
        self._seen += sum(map(len, texts))
        *lines, self._begun = (self._begun + "".join(texts)).split("\n")
        return lines

    def close(self) -> None:
        """End the connection."""
        self._closed.set()

    def rest(self) -> list[str]:
        """Return the lines of a job that is over that have not come."""
        self._thread.join(2 * AGAIN_SECONDS)
        lines = self.take(0.0)
        try:
            missing = self._jobs.log(self._name)[self._seen :]
        except JobError as error:  # the cluster may end with its job
            missing = f"\nthe end of the log is missing ({error})"
        return [*lines, *(self._begun + missing).splitlines()]

    def _stream(self) -> None:
        """In a thread: pass on what the job prints, from where the last connection ended."""
        came = 0
        while not self._closed.is_set():
            try:
                came = asyncio.run(self._pass_on(came))
            except _Broken as broken:
                came = broken.came
            self._closed.wait(AGAIN_SECONDS)

    async def _pass_on(self, came: int) -> int:
        at = 0  # each connection begins with the log's first character
        try:
            async for text in self._jobs.tail(self._name):
                new = text[max(0, came - at) :]
                at += len(text)
                if new:
                    self._came.put(new)
                    came += len(new)
        except JobError as error:
            raise _Broken(came) from error
        return came


class _Broken(Exception):
    """A connection that broke after so many characters of the log had come in all."""

    def __init__(self, came: int) -> None:
        super().__init__(came)
        self.came = came

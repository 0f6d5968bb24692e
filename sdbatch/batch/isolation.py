"""Rows drawn in a child process of the drawing actor, so that a row that ends its process is found.

When an actor dies, Ray does not say by which signal; only the parent of a process learns that. So
after a death during a shard, its actor lets a child with an engine of its own draw the rows, group
after group. If the child ends, another one draws half of the group, and so on down to single rows.
The rows that survive are the shard's results.

`python -m sdbatch.batch.isolation FD` is the child; FD is its end of the pipe.
"""

import faulthandler
import os
import pickle
import signal
import subprocess
import sys
import threading
from concurrent.futures import CancelledError, Future, InvalidStateError, wait
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeAlias

from sdbatch.batch.liveness import MOST_LOADS
from sdbatch.engine.request import Usage
from sdbatch.errors import ModelError, SdbatchError

if TYPE_CHECKING:
    from sdbatch.stages.draw import DrawImages

Rows: TypeAlias = list[dict[str, Any]]

GROUP = 32  # rows that a child draws at a time: they fill an engine, and few are drawn again
# Of a row that is drawn alone. Two, because one may come from outside: the machine is preempted, or
# the kernel kills a process for lack of memory.
MOST_DEATHS_ALONE = 2
USAGE_SECONDS = 0.5  # between two reports of a child's engine


class IsolatedDrawing:
    """The rows of one shard on their way through child processes; used like stages.draw.Drawing.

    Args:
        stage: of the actor; each child makes an engine like the actor's.
        rows: as Drawing gets them.
        usages: process id of a child -> what its engine has done; each child adds its own.
    """

    def __init__(self, stage: "DrawImages", rows: Rows, usages: dict[int, Usage]) -> None:
        self.drawn = 0
        self.failed = 0
        self.lanes: dict[int, int] = {}  # lanes of the batch -> images drawn in that many
        self.done: Future[Rows] = Future()  # the result of each row, in order
        self._stage = stage
        self._rows = rows
        self._usages = usages
        self._child: _Child | None = None
        self._starting = threading.Lock()  # or a child could start after `done` has ended
        self.done.add_done_callback(self._kill_child)

    def start(self) -> None:
        """Draw the rows, in a thread."""
        threading.Thread(target=self._run, name="sdbatch-isolation", daemon=True).start()

    def give_up(self, error: Exception) -> None:
        """End the shard with an error that no row caused, and its child."""
        with suppress(InvalidStateError):
            self.done.set_exception(error)

    def _run(self) -> None:
        results: Rows = []
        try:
            for at in range(0, len(self._rows), GROUP):
                results += self._draw(self._rows[at : at + GROUP])
        except Exception as error:  # noqa: BLE001  raised again by the actor
            self.give_up(error)
        self._close_child()
        with suppress(InvalidStateError):
            self.done.set_result(results)

    def _draw(self, rows: Rows) -> Rows:
        """Return the results of `rows`, drawn together, or in halves if their process ends."""
        for _ in range(MOST_DEATHS_ALONE):
            try:
                return self._draw_together(rows)
            except _ProcessEnded as ended:
                self._close_child()
                error = f"Drawing this row ended its process {ended}."
            if len(rows) > 1:
                middle = len(rows) // 2
                return self._draw(rows[:middle]) + self._draw(rows[middle:])
        self.failed += 1
        return [{"error": error}]

    def _draw_together(self, rows: Rows) -> Rows:
        child = self._child or self._load_child()
        results, lanes = child.ask(pickle.dumps(rows))
        failed = sum(result["error"] is not None for result in results)
        self.failed += failed
        self.drawn += len(results) - failed
        for number, images in lanes.items():
            self.lanes[number] = self.lanes.get(number, 0) + images
        return list(results)

    def _load_child(self) -> "_Child":
        """Return a new child whose engine is loaded.

        Raises:
            SdbatchError: the engine cannot be loaded.
        """
        import ray.cloudpickle

        stage = ray.cloudpickle.dumps(self._stage)  # pickle rejects local functions
        for _ in range(MOST_LOADS):
            child = self._start_child()
            try:
                child.ask(stage)
            except _ProcessEnded as ended:
                self._close_child()
                how = str(ended)
            else:
                return child
        raise ModelError(
            f"A process that loaded the model to draw rows apart from the others ended {how}, "
            f"{MOST_LOADS} times: the model must fit into memory twice. Set fewer cluster.actors "
            f"or take machines with more memory, and run the same command again to resume."
        )

    def _start_child(self) -> "_Child":
        with self._starting:
            if self.done.done():
                raise CancelledError
            self._child = _Child(self._usages)
            return self._child

    def _kill_child(self, _: Future[Rows]) -> None:
        with self._starting:
            child = self._child
        if child is not None:
            child.kill()

    def _close_child(self) -> None:
        if self._child is not None:
            self._child.close()
            self._child = None


class _ProcessEnded(Exception):
    """A child ended before it answered. The text says how: by signal SIGSEGV, with exit code 7."""


class _Child:
    """A child process, in the process that started it."""

    def __init__(self, usages: dict[int, Usage]) -> None:
        self._usages = usages
        self._pipe, theirs = Pipe()
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno())],
                env={**os.environ, "PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                stdout=2,  # with stderr into the worker's log
                pass_fds=[theirs.fileno()],
            )

    def ask(self, message: bytes) -> Any:
        """Send a pickled message and return the answer.

        Raises:
            _ProcessEnded: the child ended first.
            SdbatchError: the child's engine cannot be loaded, or cannot go on.
        """
        try:
            self._pipe.send_bytes(message)
            while isinstance(answer := self._pipe.recv(), Usage):
                self._usages[self._process.pid] = answer
        except (EOFError, OSError) as error:
            raise _ProcessEnded(_how_ended(self._process.wait())) from error
        if isinstance(answer, SdbatchError):
            raise answer
        return answer

    def kill(self) -> None:
        """End the process; `ask` in another thread raises."""
        self._process.kill()

    def close(self) -> None:
        """End the process, and wait until its memory is free."""
        self._process.kill()
        self._process.wait()
        self._pipe.close()


def _how_ended(returncode: int) -> str:
    if returncode >= 0:
        return f"with exit code {returncode}"
    known = -returncode in {*signal.Signals}
    return f"by signal {signal.Signals(-returncode).name if known else -returncode}"


def main(pipe: Connection) -> None:
    """Load the stage that arrives first, then draw the groups of rows that arrive."""
    os.set_inheritable(pipe.fileno(), False)  # or a process that outlives this one would hold it
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the driver, which ends the run
    faulthandler.enable()
    stage: DrawImages = pipe.recv()
    groups: SimpleQueue[Rows] = SimpleQueue()
    threading.Thread(target=_receive, args=(pipe, groups), daemon=True).start()
    try:
        stage.open()
    except SdbatchError as error:
        pipe.send(error)
    else:
        pipe.send("loaded")
    while True:
        pipe.send(_draw(stage, groups.get(), pipe))


def _receive(pipe: Connection, groups: SimpleQueue[Rows]) -> None:
    """Queue what arrives; end this process at once when its parent is gone."""
    while True:
        try:
            groups.put(pipe.recv())
        except (EOFError, OSError):
            os._exit(0)


def _draw(stage: "DrawImages", rows: Rows, pipe: Connection) -> Any:
    """Draw a group, and report the engine's usage meanwhile; return the answer."""
    drawing = stage.new_drawing(rows)
    try:
        drawing.start()
        while not wait([drawing.done], USAGE_SECONDS).done:
            pipe.send(stage.engine.usage)
        pipe.send(stage.engine.usage)
        return drawing.done.result(), drawing.lanes
    except SdbatchError as error:
        return error


if __name__ == "__main__":
    main(Connection(int(sys.argv[1])))

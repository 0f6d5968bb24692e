"""The signs of life that a run gives: its heartbeat, and whether it still owns its output."""

import threading

from sdbatch.errors import StorageError
from sdbatch.output.lease import Lease
from sdbatch.output.progress import Heartbeat, Progress, State, write_heartbeat
from sdbatch.storage import is_local

HEARTBEAT_SECONDS = 2.0  # between writes of progress.json
REMOTE_HEARTBEAT_SECONDS = 5.0  # the same on an object store, where each write is a request
FAREWELL_SECONDS = 30.0  # a store that does not answer delays the end of a run no longer


class Pulse:
    """Writes the heartbeat from a thread of its own: a store that fails or waits stops nothing."""

    def __init__(self, lease: Lease) -> None:
        self.lost: str | None = None  # why this run does not own the output any more
        self._lease = lease
        self._every = HEARTBEAT_SECONDS
        if not is_local(lease.store.url):
            self._every = REMOTE_HEARTBEAT_SECONDS
        self._beat = 0
        self._state: State = "running"
        self._progress = Progress(planned=0, drawn=0, failed=0, images_per_s=0.0, step="starting")
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._go_on, name="sdbatch-heartbeat", daemon=True)
        self._thread.start()

    def update(self, progress: Progress) -> None:
        """Set what the next heartbeat says."""
        self._progress = progress

    def end(self, state: State) -> None:
        """Write a last heartbeat and release the lease, unless the store does not answer."""
        self._state = state
        self._ended.set()
        self._thread.join(FAREWELL_SECONDS)
        self._lease.forget()

    def _go_on(self) -> None:
        ended = False
        while not ended and self.lost is None:
            ended = self._ended.is_set()
            try:
                self.lost = self._lease.lost()
                if self.lost is None:
                    self._write()
                    if ended:
                        self._lease.release(self._state)
            except StorageError:
                pass  # the writes of the shards report it
            if not ended:
                self._ended.wait(self._every)

    def _write(self) -> None:
        self._beat += 1
        run = self._lease.run.id
        beat = Heartbeat(run, self._beat, self._state, self._every, self._progress)
        write_heartbeat(self._lease.store, beat)

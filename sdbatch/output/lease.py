"""The lease of an output: which run may write it now.

A run begins with a file in runs/ that has the next free number, created on condition that it does
not exist: of two runs that begin at the same time, one wins. The file with the highest number is
the lease, until it says that its run has ended. An owner that shows no sign of life loses its lease
to the next run, and notices that before it writes anything more.

No clock decides: a process of this machine is looked up, any other must change its heartbeat
while the next run watches.
"""

import os
import socket
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from sdbatch.errors import JobError, StorageError
from sdbatch.output import names
from sdbatch.output.progress import read_heartbeat
from sdbatch.storage import Store

# Longer than a network filesystem keeps old contents (NFS: acdirmax, 60 s), and many heartbeats.
PATIENCE_SECONDS = 75.0
_POLL_SECONDS = 0.5
_held: set[str] = set()  # runs of this process that have not ended, by id


@checked_dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class Run:
    """A run of an output, as its file in runs/ says."""

    number: int
    id: str  # of this run alone, on any machine
    host: str
    pid: int
    process: str  # tells whether a process of this machine is the one; empty: unknown
    began: str  # clock time of its host, UTC
    ended: str | None = None  # finished, stopped, failed; None: not yet

    @property
    def is_here(self) -> bool:
        """Tell whether its process can be looked up on this machine."""
        return bool(self.process) and self.process.rpartition(":")[0] == _machine()

    def describe(self) -> str:
        """Return who and where, since when."""
        return f"run {self.id} (process {self.pid} on {self.host}, since {self.began})"


_RUN = TypeAdapter(Run)


@dataclass(frozen=True)
class Lease:
    """The lease as its owner holds it, in the driver and in every process that writes."""

    store: Store
    run: Run

    def lost(self) -> str | None:
        """Return why this run does not own the output any more; None if it does."""
        return self._lost_to(newest_run(self.store))

    def check(self) -> None:
        """Raise a StorageError if this run has ended, or does not own the output any more.

        A run that is stopped releases its lease before it counts what is committed.
        """
        newest = newest_run(self.store)
        lost = self._lost_to(newest)
        if lost is None and newest is not None and newest.ended is not None:
            lost = f"output.path = {self.store.url}: this run has ended and commits nothing more."
        if lost is not None:
            raise StorageError(lost)

    def _lost_to(self, newest: Run | None) -> str | None:
        if newest is not None and newest.id == self.run.id:
            return None
        why = f"{newest.describe()} owns it now" if newest else "it was moved away or emptied"
        return f"output.path = {self.store.url}: {why}, so this run has ended."

    def release(self, state: str) -> None:
        """Note that the run has ended, so that the next one begins at once."""
        _held.discard(self.run.id)
        if self.lost() is None:
            _write(self.store, replace(self.run, ended=state))

    def forget(self) -> None:
        """Let another run of this process begin, though the store may not have taken `release`."""
        _held.discard(self.run.id)

    def withdraw(self) -> None:
        """Remove what the lease wrote to an output that did not exist before."""
        if self.lost() is None:
            self.store.remove(names.PROGRESS)
            self.store.remove(names.run_file(self.run.number))
            self.store.remove_if_empty(names.RUNS)
            self.store.remove_if_empty()


def take(store: Store, show: Callable[[str], None] = lambda text: None) -> Lease:
    """Become the owner of an output; it is created if it does not exist.

    Args:
        store: the output.
        show: receives what the run waits for.

    Raises:
        JobError: a living run owns it.
        StorageError: it cannot be written.
    """
    store.begin()
    before = _newest_number(store)
    owner = newest_run(store)
    if owner is not None and owner.ended is None:
        if not owner.is_here:
            show(f"looking for signs of life of {owner.describe()}")
        if is_alive(store, owner):
            raise _owned(store, newest_run(store) or owner)  # another may own it by now
    run = Run(
        number=before + 1,
        id=f"{before + 1:06d}-{uuid.uuid4().hex[:8]}",
        host=socket.gethostname(),
        pid=os.getpid(),
        process=_process(os.getpid()) or "",
        began=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )
    _held.add(run.id)  # before others can see the file
    if not store.create(names.run_file(run.number), _RUN.dump_json(run)):
        winner = newest_run(store)
        if winner != run:  # else the answer to the first of two requests was lost
            _held.discard(run.id)
            raise (
                _owned(store, winner)
                if winner
                else StorageError(
                    f"output.path = {store.url}: another run began at the same moment. Run the "
                    f"command again."
                )
            )
    return Lease(store, run)


def end_dead_run(store: Store, pid: int) -> None:
    """Note that the run of a process of this machine has ended, if it owns the output."""
    run = newest_run(store)
    if run is not None and (run.pid, run.host, run.ended) == (pid, socket.gethostname(), None):
        _write(store, replace(run, ended="stopped"))


def newest_run(store: Store) -> Run | None:
    """Return the run that owns the output, or owned it last; None if there was none.

    A file that cannot be read is of a run that died while it wrote the file. Should it live, it
    finds that it is not the owner.
    """
    number = _newest_number(store)
    data = store.read_if_exists(names.run_file(number)) if number else None
    if data is None:
        return None
    try:
        return _RUN.validate_json(data)
    except ValidationError:
        return Run(number, f"{number:06d}", "unknown", 0, "", "unknown", ended="failed")


def is_alive(store: Store, run: Run, patience: float = PATIENCE_SECONDS) -> bool:
    """Tell whether a run without an end goes on.

    Its process is looked up if it is on this machine. Otherwise its heartbeat must change, or it
    must end, within `patience` seconds.
    """
    if run.is_here:
        process = _process(run.pid)
        if run.pid == os.getpid() and run.process == process:
            return run.id in _held
        if process is not None:
            return process == run.process
    first = read_heartbeat(store)
    until = time.monotonic() + patience
    while time.monotonic() < until:
        now = read_heartbeat(store)
        if now is not None and now.run == run.id and now != first:
            return True
        newest = newest_run(store)
        if newest is None or newest != run:
            return newest is not None and newest.ended is None
        time.sleep(_POLL_SECONDS)
    return False


def _owned(store: Store, owner: Run) -> JobError:
    return JobError(
        f"output.path = {store.url}: {owner.describe()} is drawing it: must have one run at "
        f"a time. Wait until that run ends, or stop it; `sdbatch status {store.url}` shows it."
    )


def _newest_number(store: Store) -> int:
    return max(
        (number for name in store.names(names.RUNS) if (number := names.run_number(name))),
        default=0,
    )


def _write(store: Store, run: Run) -> None:
    store.put(names.run_file(run.number), _RUN.dump_json(run))


def _machine() -> str:
    """Return a name of this boot of this machine and of its processes' namespace."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    try:
        return f"{boot.read_text().strip()}:{os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return socket.gethostname()


def _process(pid: int) -> str | None:
    """Return a name of a process that no later one has.

    Empty if there is no such process; None if it is hidden, as those of other users can be.
    """
    try:
        state, *stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if state in "XZ" else f"{_machine()}:{pid}-{stat[18]}"  # the ticks of its start
    except OSError:
        pass
    linux = Path("/proc/self/stat").exists()
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        if linux:
            return None
    return "" if linux else f"{_machine()}:{pid}"

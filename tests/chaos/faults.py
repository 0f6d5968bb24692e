"""The faults of the chaos suite: each breaks one thing while a run goes on."""

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from tests.chaos import store
from tests.chaos.place import Place

VICTIM_SECONDS = 10.0  # for a process of a kind to appear
STOP_SECONDS = (1.0, 12.0)  # for which a process is stopped
STORE_SECONDS = (0.5, 8.0)  # for which a store misbehaves

ACTOR, LIVENESS, RAYLET, HEAD = "DrawingActor", "ray::Liveness", "raylet/raylet", "gcs_server"
TASK = "ray::MapBatches(BlockStage)"
AGENT = "DashboardAgent"
RAY_DATA = "ray::_StatsActor", "ray::_AutoscalingCoordinatorActor", "ray::ActorLocationTracker"


@dataclass
class Run:
    """A start of the command that goes on."""

    place: Place
    process: subprocess.Popen
    random: random.Random

    def driver(self) -> int | None:
        """Return the process that works; the command's own is its parent."""
        try:
            with open(f"/proc/{self.process.pid}/task/{self.process.pid}/children") as children:
                return int(children.read().split()[0])
        except (OSError, IndexError):
            return None


def send(run: Run, pid: int | None, kind: str) -> None:
    """Send a process a signal; STOP is for a while, INT comes twice."""
    if pid is None:
        raise NoVictim
    with suppress(ProcessLookupError):
        if kind == "INT twice":
            os.kill(pid, signal.SIGINT)
            time.sleep(run.random.uniform(0.1, 2))
            os.kill(pid, signal.SIGINT)
        elif kind == "STOP":
            os.kill(pid, signal.SIGSTOP)
            time.sleep(run.random.uniform(*STOP_SECONDS))
            os.kill(pid, signal.SIGCONT)
        else:
            os.kill(pid, signal.Signals[f"SIG{kind}"])


class NoVictim(Exception):
    """There is no such process now."""


def signal_to(*titles: str, kind: str) -> Callable[[Run], None]:
    """Return a fault: a signal to a process of Ray by its title, as soon as there is one."""

    def fault(run: Run) -> None:
        until = time.monotonic() + VICTIM_SECONDS
        pid = run.place.find(*titles)
        while pid is None and time.monotonic() < until and run.process.poll() is None:
            pid = run.place.find(*titles)
        send(run, pid, kind)

    return fault


def signal_to_driver(kind: str) -> Callable[[Run], None]:
    """Return a fault: a signal to the process that works."""
    return lambda run: send(run, run.driver(), kind)


def signal_to_command(kind: str) -> Callable[[Run], None]:
    """Return a fault: a signal to the command's own process, as a terminal sends it."""
    return lambda run: send(run, run.process.pid, kind)


def second_start(run: Run) -> None:
    """Start the same command while the first goes on: it is refused, or finds nothing to draw."""
    code = run.place.start("second.txt").wait(600)
    said = (run.place.folder / "second.txt").read_text()
    refused = code == 2 and "is drawing it" in said
    if run.process.poll() is None and not refused and "  0 drawn by this run" not in said:
        raise AssertionError(f"a second start was not refused: exit code {code}\n{said}")


def store_is(fault: str) -> Callable[[Run], None]:
    """Return a fault: the store does that for a while."""

    def break_store(run: Run) -> None:
        run.place.proxy.fault = fault
        time.sleep(run.random.uniform(*STORE_SECONDS))
        run.place.proxy.fault = None

    return break_store


def lose_node(run: Run) -> None:
    """Kill all processes of a node at once; another node joins."""
    run.place.cluster.lose(run.random.choice(run.place.cluster.nodes))
    run.place.cluster.add()


def lose_raylet(run: Run) -> None:
    """Kill the raylet of a node; another node joins."""
    cluster = run.place.cluster
    node = run.random.choice(cluster.nodes)
    send(run, cluster.raylet(node), "KILL")
    cluster.nodes.remove(node)
    cluster.add()


EVERYWHERE: dict[str, Callable[[Run], None]] = {
    **{f"driver {kind}": signal_to_driver(kind) for kind in ("KILL", "TERM", "STOP", "INT twice")},
    **{f"command {kind}": signal_to_command(kind) for kind in ("KILL", "TERM", "INT twice")},
    **{f"drawing actor {kind}": signal_to(ACTOR, kind=kind) for kind in ("KILL", "TERM", "STOP")},
    **{f"task {kind}": signal_to(TASK, kind=kind) for kind in ("KILL", "TERM", "STOP")},
    **{f"liveness {kind}": signal_to(LIVENESS, kind=kind) for kind in ("KILL", "STOP")},
    "Ray Data's actor KILL": signal_to(*RAY_DATA, kind="KILL"),
    "second start": second_start,
}
OWN_RAY = {
    **{f"raylet {kind}": signal_to(RAYLET, kind=kind) for kind in ("KILL", "STOP")},
    **{f"head {kind}": signal_to(HEAD, kind=kind) for kind in ("KILL", "STOP")},
    "agent KILL": signal_to(AGENT, kind="KILL"),
}
CLUSTER = {
    "node lost": lose_node,
    "raylet of a node KILL": lose_raylet,
    "head KILL": signal_to(HEAD, kind="KILL"),
}
STORE = {f"store {fault}": store_is(fault) for fault in store.FAULTS}
ENDING = [name for name in EVERYWHERE if name.startswith(("driver ", "command "))]
ENDING.remove("driver STOP")  # only for a while


def possible(place: Place) -> dict[str, Callable[[Run], None]]:
    """Return the faults that a place can have, by name."""
    return {
        **EVERYWHERE,
        **(OWN_RAY if place.cluster is None else CLUSTER),
        **(STORE if place.proxy is not None else {}),
    }

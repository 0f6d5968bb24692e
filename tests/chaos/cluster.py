"""A Ray cluster of nodes that can be lost one by one: all processes of a node die at once."""

import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

from tests.ray.processes import processes
from tests.wait import wait_until

RAY = str(Path(sys.executable).parent / "ray")
STARTS = 3
NODE = "CHAOS_NODE"  # in the environment of a node's processes


class Cluster:
    """A head that draws nothing and nodes of two CPUs each, in processes marked by `folder`."""

    def __init__(self, folder: Path, environment: dict[str, str], nodes: int = 3) -> None:
        self._folder = folder
        self._environment = environment
        self._size = nodes
        self._started = 0
        self.nodes: list[int] = []
        self.address = ""

    def start(self) -> None:
        """Start the head and the nodes, after a loss of the head also."""
        self.kill()
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.address = f"127.0.0.1:{port}"
        self._start_node("--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=false")
        self.nodes = [self._start_node(f"--address={self.address}", "--num-cpus=2")]
        while len(self.nodes) < self._size:
            self.add()

    def add(self) -> None:
        """Let another node join."""
        self.nodes.append(self._start_node(f"--address={self.address}", "--num-cpus=2"))

    def lose(self, node: int) -> None:
        """Kill all processes of a node at once."""
        self.nodes.remove(node)
        _kill(f"{NODE}={node}")

    def kill(self) -> None:
        """Kill all nodes."""
        for node in range(self._started):
            _kill(f"{NODE}={node}")

    def raylet(self, node: int) -> int | None:
        """Return the process of a node's raylet."""
        return find(f"{NODE}={node}", "raylet/raylet")

    def _start_node(self, *options: str) -> int:
        """Start a node, at most STARTS times: on a busy machine Ray gives up after a minute."""
        for _ in range(STARTS):
            node, self._started = self._started, self._started + 1
            log = self._folder / f"node{node}.txt"
            with log.open("w") as out:
                done = subprocess.run(
                    [RAY, "start", *options, "--disable-usage-stats"],
                    env={**self._environment, NODE: str(node)},
                    stdout=out,
                    stderr=out,
                )
            if done.returncode == 0:
                wait_until(partial(self.raylet, node))
                return node
            _kill(f"{NODE}={node}")
        raise AssertionError(f"`ray start {' '.join(options)}` failed:\n{log.read_text()}")


def find(mark: str, *words: str) -> int | None:
    """Return the newest process with `mark` in its environment and a word in its command."""
    found = (pid for pid, command in processes(mark).items() if any(w in command for w in words))
    return max(found, default=None)


def _kill(mark: str) -> None:
    for pid in processes(mark):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

"""The two services that benchmarks/serve*.py measure, each in its own processes, and the load."""

import asyncio
import collections
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

sys.path.append(str(Path(__file__).parents[1]))  # the code of another state comes first

from tests.ray.processes import find_processes, kill_all, marked, ray_files

HERE = Path(__file__).parent
SAMPLING = {"height": 128, "width": 128, "num_inference_steps": 25, "guidance_scale": 2.5}
REPLICAS, QUEUE = 2, 256
FRONT, DRAWER, PROXY = ":Front", ":Drawer", "ProxyActor"  # in the titles of Ray's processes
PROMPT = "a large red circle on a white background"
Send = Callable[[httpx.AsyncClient, int], Awaitable[int]]  # -> status


@dataclass(frozen=True)
class Served:
    """A service that runs."""

    url: str
    ray_folder: Path  # of its Ray's files
    log: Path  # what it prints

    def find(self, title: str) -> list[int]:
        """Return the processes of its Ray whose title contains `title`, such as `:Front`."""
        return find_processes(self.ray_folder, title)


def resident(service: Served) -> dict[str, float]:
    """Return the resident memory of the front, the drawers and the proxy, in MiB."""
    results = {}
    for name, title in (("front", FRONT), ("drawer", DRAWER), ("proxy", PROXY)):
        statm = [Path(f"/proc/{pid}/statm").read_text() for pid in service.find(title)]
        pages = sum(int(text.split()[1]) for text in statm)
        results[f"{name} MiB"] = round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)
    return results


@contextlib.contextmanager
def served(
    command: list[str], ready: str, environment: Mapping[str, str] | None = None
) -> Iterator[Served]:
    """Run a command that serves at the port that replaces PORT in it, until the end of the block.

    Args:
        command: starts a Ray of its own.
        ready: the path that answers with 200 once it is ready.
        environment: variables in addition to those of this process.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [port if part == "PORT" else part for part in command]
    with ray_files() as folder, (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command,
            env={**marked(folder), **(environment or {})},
            start_new_session=True,
            stdout=log,
            stderr=log,
        )
        service = Served(f"http://127.0.0.1:{port}", folder, folder / "log")
        try:
            _wait_until_ready(process, service, ready)
            yield service
        finally:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            kill_all(folder)
            process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], service: Served, ready: str) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if process.poll() is not None:
            text = service.log.read_text()
            raise RuntimeError(f"{process.args} ended with {process.returncode}: {text}")
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(service.url + ready, timeout=60).status_code == 200:
                return
        time.sleep(0.3)
    raise RuntimeError(f"{process.args} was not ready within 300 s")


@contextlib.contextmanager
def sdbatch(
    replicas: int = REPLICAS,
    *,
    environment: Mapping[str, str] | None = None,
    sections: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Iterator[Served]:
    """Serve the embedded model with sdbatch.

    Args:
        replicas: their number, unless the settings have another one.
        environment: variables in addition to those of this process.
        sections: of the job, in place of the benchmark's own.
        settings: of the job's `serve`.
    """
    serve = {"min_replicas": replicas, "max_replicas": replicas, "queue": QUEUE} | settings
    job = {
        "prompts": {"rows": [{"prompt": PROMPT}]},
        "model": "builtin:shapes",
        "sampling": SAMPLING,
        "output": {"path": "nowhere"},
        "serve": serve,
        **(sections or {}),
    }
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        json.dump(job, file)  # JSON is YAML
        file.flush()
        command = [str(Path(sys.executable).parent / "sdbatch"), "serve", file.name]
        with served([*command, "--port", "PORT"], "/readyz", environment) as service:
            yield service


def example() -> contextlib.AbstractContextManager[Served]:
    """Serve it with the example of Ray Serve's documentation."""
    command = [sys.executable, str(HERE / "serve_example.py"), "PORT", str(REPLICAS)]
    return served(command, "/imagine?prompt=a")


async def send_to_sdbatch(client: httpx.AsyncClient, number: int) -> int:
    """Request one image; return the status."""
    body = {"prompt": PROMPT, "seed": number}
    return (await client.post("/v1/images/generations", json=body)).status_code


async def send_to_example(client: httpx.AsyncClient, number: int) -> int:
    """Request one image; return the status."""
    return (await client.get("/imagine", params={"prompt": PROMPT})).status_code


async def send_small(client: httpx.AsyncClient, number: int) -> int:
    """Request an image that is drawn in a moment; return the status."""
    body = {"prompt": PROMPT, "num_inference_steps": 1, "size": "32x32", "guidance_scale": 1}
    return (await client.post("/v1/images/generations", json=body)).status_code


async def load(
    url: str,
    send: Send,
    clients: int,
    requests: int,
    *,
    is_measured: Callable[[int], bool] = lambda number: True,
) -> dict[str, Any]:
    """Send `requests` requests from `clients` clients; return images/s, latencies and statuses.

    Args:
        url: of the service.
        send: sends the request of a number.
        clients: each sends its next request after the response to its last.
        requests: their number.
        is_measured: whether the request of a number counts for images/s and latencies.
    """
    numbers = iter(range(requests))
    seconds: list[float] = []
    statuses: collections.Counter[int] = collections.Counter()
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:

        async def run_client() -> None:
            for number in numbers:
                started = time.perf_counter()
                statuses[status := await send(client, number)] += 1
                if status != 200:
                    await asyncio.sleep(0.5)
                elif is_measured(number):
                    seconds.append(time.perf_counter() - started)

        started = time.perf_counter()
        await asyncio.gather(*(run_client() for _ in range(clients)))
        elapsed = time.perf_counter() - started
    if not seconds:
        raise RuntimeError(f"no request was answered with 200: {statuses}")
    return {
        "requests": requests,
        "images/s": round(len(seconds) / elapsed, 2),
        **latencies(seconds),
        "answered": dict(statuses),
    }


def latencies(seconds: list[float]) -> dict[str, float]:
    """Return the median and the 99th percentile of the seconds of requests."""
    ordered = sorted(seconds)
    return {
        "p50 s": round(statistics.median(ordered), 2),
        "p99 s": round(ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))], 2),
    }

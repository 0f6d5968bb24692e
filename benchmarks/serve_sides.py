"""The two services that benchmarks/serve.py measures, each in its own process, and the load."""

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
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

HERE = Path(__file__).parent
SAMPLING = {"height": 128, "width": 128, "num_inference_steps": 25, "guidance_scale": 2.5}
REPLICAS, QUEUE = 2, 256
PROMPT = "a large red circle on a white background"
Send = Callable[[httpx.AsyncClient, int], Awaitable[int]]  # -> status


@contextlib.contextmanager
def served(command: list[str], ready: str) -> Iterator[str]:
    """Run a command that serves at the port that replaces PORT in it; yield its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [port if part == "PORT" else part for part in command]
    process = subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise RuntimeError(f"{command} ended with {process.returncode}")
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(url + ready, timeout=60).status_code == 200:
                    break
            time.sleep(0.3)
        yield url
    finally:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextlib.contextmanager
def sdbatch(replicas: int = REPLICAS, **settings: Any) -> Iterator[str]:
    """Serve the embedded model with sdbatch."""
    serve = {"min_replicas": replicas, "max_replicas": replicas, "queue": QUEUE} | settings
    job = {
        "prompts": {"rows": [{"prompt": PROMPT}]},
        "model": "builtin:shapes",
        "sampling": SAMPLING,
        "output": {"path": "nowhere"},
        "serve": serve,
    }
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        json.dump(job, file)  # JSON is YAML
        file.flush()
        command = [str(Path(sys.executable).parent / "sdbatch"), "serve", file.name]
        with served([*command, "--port", "PORT"], "/readyz") as url:
            yield url


def example() -> contextlib.AbstractContextManager[str]:
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


async def load(url: str, send: Send, clients: int, requests: int) -> dict[str, Any]:
    """Send `requests` requests from `clients` clients; return images/s, latencies and statuses."""
    numbers = iter(range(requests))
    seconds: list[float] = []
    statuses: collections.Counter[int] = collections.Counter()
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:

        async def run_client() -> None:
            for number in numbers:
                started = time.perf_counter()
                statuses[status := await send(client, number)] += 1
                if status == 200:
                    seconds.append(time.perf_counter() - started)
                else:
                    await asyncio.sleep(0.5)

        started = time.perf_counter()
        await asyncio.gather(*(run_client() for _ in range(clients)))
        elapsed = time.perf_counter() - started
    if not seconds:
        raise RuntimeError(f"no request was answered with 200: {statuses}")
    seconds.sort()
    return {
        "requests": requests,
        "images/s": round(len(seconds) / elapsed, 2),
        "p50 s": round(statistics.median(seconds), 2),
        "p99 s": round(seconds[min(len(seconds) - 1, int(0.99 * len(seconds)))], 2),
        "answered": dict(statuses),
    }

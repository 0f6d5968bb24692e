"""The two sides that benchmarks/serve.py measures, each in a process of its own, and the load."""

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
Ask = Callable[[httpx.AsyncClient, int], Awaitable[int]]  # -> status


@contextlib.contextmanager
def served(command: list[str], ready: str) -> Iterator[str]:
    """Run a command that serves at a port, which it is given for PORT; yield its URL."""
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
    """Serve the embedded model by sdbatch."""
    own = {"min_replicas": replicas, "max_replicas": replicas, "queue": QUEUE} | settings
    job = {
        "prompts": {"rows": [{"prompt": PROMPT}]},
        "model": "builtin:shapes",
        "sampling": SAMPLING,
        "output": {"path": "nowhere"},
        "serve": own,
    }
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        json.dump(job, file)  # YAML too
        file.flush()
        command = [str(Path(sys.executable).parent / "sdbatch"), "serve", file.name]
        with served([*command, "--port", "PORT"], "/readyz") as url:
            yield url


def example() -> contextlib.AbstractContextManager[str]:
    """Serve it as the documentation's example does."""
    command = [sys.executable, str(HERE / "serve_example.py"), "PORT", str(REPLICAS)]
    return served(command, "/imagine?prompt=a")


async def ask_sdbatch(client: httpx.AsyncClient, number: int) -> int:
    """Ask for one image."""
    asked = {"prompt": PROMPT, "seed": number}
    return (await client.post("/v1/images/generations", json=asked)).status_code


async def ask_example(client: httpx.AsyncClient, number: int) -> int:
    """Ask for one image."""
    return (await client.get("/imagine", params={"prompt": PROMPT})).status_code


async def ask_little(client: httpx.AsyncClient, number: int) -> int:
    """Ask for an image that is drawn at once."""
    asked = {"prompt": PROMPT, "num_inference_steps": 1, "size": "32x32", "guidance_scale": 1}
    return (await client.post("/v1/images/generations", json=asked)).status_code


async def load(url: str, ask: Ask, clients: int, requests: int) -> dict[str, Any]:
    """Send so many requests by so many clients; return images/s, and what was answered when."""
    numbers = iter(range(requests))
    seconds: list[float] = []
    statuses: collections.Counter[int] = collections.Counter()
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:

        async def one() -> None:
            for number in numbers:
                began = time.perf_counter()
                statuses[status := await ask(client, number)] += 1
                if status == 200:
                    seconds.append(time.perf_counter() - began)
                else:
                    await asyncio.sleep(0.5)

        began = time.perf_counter()
        await asyncio.gather(*(one() for _ in range(clients)))
        took = time.perf_counter() - began
    if not seconds:
        raise RuntimeError(f"no request was answered as it should be: {statuses}")
    seconds.sort()
    return {
        "requests": requests,
        "images/s": round(len(seconds) / took, 2),
        "p50 s": round(statistics.median(seconds), 2),
        "p99 s": round(seconds[min(len(seconds) - 1, int(0.99 * len(seconds)))], 2),
        "answered": dict(statuses),
    }

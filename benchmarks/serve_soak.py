"""The memory of `sdbatch serve` over many requests of all kinds, with an engine that draws at once.

    python benchmarks/serve_soak.py [--requests 50000] [--output benchmarks/results/serve_soak]

The Front, Ray's proxy and one replica are the real ones; only its engine is the fake one of the
tests. Images and ended jobs are kept for a short time, so that their room is full before the second
half begins. In that half, no process may grow by more than MAX_GROWTH_MIB, or the exit code is 1;
the same if a request is answered otherwise than its kind must be. Linux only (/proc).
"""

import asyncio
import contextlib
import itertools
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import click
import httpx
from findings import Findings
from serve_sides import PROMPT, Served, resident, served

from sdbatch.job import parse
from sdbatch.resolve import Resolved
from sdbatch.serve.application import serve_job
from tests.fakes import FakeEngine

JOB = {
    "prompts": {"rows": [{"prompt": PROMPT}]},
    "model": "builtin:shapes",
    "sampling": {"height": 64, "width": 64, "num_inference_steps": 4, "guidance_scale": 1},
    "engine": {"threads": 1},
    "output": {"path": "nowhere"},
    "serve": {"max_replicas": 1, "timeout_s": 20, "keep_s": 30, "keep_mib": 4},
}
CLIENTS, PARTS = 16, 10
MAX_GROWTH_MIB = 12.0  # of a process in the second half; the allocator's steps are some MiB
DISCONNECT_SECONDS = 0.004  # after the start of a request; an answer takes about as long
IMAGES = "/v1/images/generations"
# Of so many requests each; the others ask for an image in JSON.
SHARES = {"by URL": 2, "stream": 3, "long job": 2, "error": 1, "disconnect": 1}
OUT_OF = 20


class Clients:
    """Requests of each kind; each method returns an unexpected answer, else None."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http

    async def image(self, number: int) -> str | None:
        """Request an image in JSON."""
        return _unless((await self._post(number)).status_code == 200, "an image in JSON")

    async def by_url(self, number: int) -> str | None:
        """Request an image by URL, and fetch it."""
        answer = await self._post(number, response_format="url")
        file = await self._http.get(answer.json()["data"][0]["url"])
        return _unless(file.content.startswith(b"\x89PNG"), f"a file: {file.text[:100]}")

    async def stream(self, number: int) -> str | None:
        """Request a stream with a preview."""
        answer = await self._post(number, stream=True, partial_images=1)
        return _unless("image_generation.completed" in answer.text, answer.text[-100:])

    async def long_job(self, number: int) -> str | None:
        """Start a long job, and poll it until it ends."""
        answer = await self._http.post("/v1/images/jobs", json=_body(number))
        status = answer.json()["status"]
        while status in ("queued", "drawing"):
            await asyncio.sleep(0.05)
            status = (await self._http.get(answer.json()["poll_url"])).json()["status"]
        return _unless(status == "completed", f"a job: {status}")

    async def error(self, number: int) -> str | None:
        """Send a request that is rejected, or whose image cannot be drawn, in turn."""
        if number % 2:
            return _unless((await self._post(number, steps=3)).status_code == 400, "an error")
        return _unless((await self._post(number, prompt="fail")).status_code == 400, "a failure")

    async def disconnect(self, number: int) -> str | None:
        """Disconnect before the answer, or in the middle of a stream."""
        with contextlib.suppress(TimeoutError, httpx.TransportError):
            async with asyncio.timeout(DISCONNECT_SECONDS):
                await self._post(number, n=4, stream=False)
        body = _body(number, stream=True, partial_images=2)
        async with self._http.stream("POST", IMAGES, json=body) as answer:
            return _unless(answer.status_code == 200, "a stream that is left")

    async def _post(self, number: int, **more: Any) -> httpx.Response:
        return await self._http.post(IMAGES, json=_body(number, **more))


def _body(number: int, **more: Any) -> dict[str, Any]:
    return {"prompt": f"{PROMPT} {number}", "seed": number, **more}


def _unless(is_right: bool, text: str) -> str | None:
    return None if is_right else text


async def soak(service: Served, requests: int) -> tuple[dict[str, Any], Counter[str]]:
    """Send the requests; return the memory after each part, and unexpected answers."""
    unexpected: Counter[str] = Counter()
    results = {"after 0": resident(service)}
    limits = httpx.Limits(max_connections=CLIENTS)
    async with httpx.AsyncClient(base_url=service.url, timeout=60, limits=limits) as http:
        clients = Clients(http)
        kinds: list[Callable[[int], Awaitable[str | None]]] = [
            *itertools.repeat(clients.by_url, SHARES["by URL"]),
            *itertools.repeat(clients.stream, SHARES["stream"]),
            *itertools.repeat(clients.long_job, SHARES["long job"]),
            *itertools.repeat(clients.error, SHARES["error"]),
            *itertools.repeat(clients.disconnect, SHARES["disconnect"]),
            *itertools.repeat(clients.image, OUT_OF - sum(SHARES.values())),
        ]
        chosen = random.Random(0)

        async def run_client(numbers: Any) -> None:
            for number in numbers:
                if (answer := await chosen.choice(kinds)(number)) is not None:
                    unexpected[answer] += 1

        for part in range(PARTS):
            started = time.monotonic()
            numbers = iter(range(part * requests // PARTS, (part + 1) * requests // PARTS))
            await asyncio.gather(*(run_client(numbers) for _ in range(CLIENTS)))
            name = f"after {(part + 1) * requests // PARTS}"
            seconds = round(time.monotonic() - started, 1)
            results[name] = {**resident(service), "s": seconds}
            print(name, results[name], flush=True)
    return results, unexpected


def growth(results: dict[str, dict[str, float]]) -> dict[str, float]:
    """Return by how much each process has grown from the middle to the end, in MiB."""
    rows = list(results.values())
    names = [name for name in rows[0] if name.endswith("MiB")]
    return {name: round(rows[-1][name] - rows[len(rows) // 2][name], 1) for name in names}


def serve_fake(job_file: Path, port: int) -> None:
    """Serve as `sdbatch serve` does, with the fake engine in place of the job's."""
    Resolved.make_engine = lambda *_: FakeEngine
    job = parse(json.loads(job_file.read_text()))
    serve_job(job, host="127.0.0.1", port=port, address=None, show=print)


@click.command()
@click.option("--requests", default=50_000)
@click.option("--serve", type=(click.Path(path_type=Path), int), hidden=True)  # job file, port
@click.option(
    "--output", type=click.Path(path_type=Path), help="Path of the results, without .json and .md."
)
def main(requests: int, serve: tuple[Path, int] | None, output: Path | None) -> None:
    """Measure the memory of the service; the exit code is 1 if it grows."""
    if serve is not None:
        serve_fake(*serve)
        return
    findings = Findings(output)
    findings.add("soak", {"date": time.strftime("%Y-%m-%d"), "requests": requests})
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(JOB, file)
        file.flush()
        command = [sys.executable, __file__, "--serve", file.name, "PORT"]
        root = str(Path(__file__).parents[1])  # where Ray's processes find the fake engine
        path = ":".join([root, *sys.path[1:]])
        with served(command, "/readyz", {"PYTHONPATH": path}) as service:
            results, unexpected = asyncio.run(soak(service, requests))
    grown = growth(results)
    findings.add("memory", results)
    findings.add("growth in the second half", {**grown, "at most MiB": MAX_GROWTH_MIB})
    findings.add("unexpected answers", dict(unexpected.most_common(20)) or {"none": 0})
    if unexpected or max(grown.values()) > MAX_GROWTH_MIB:
        sys.exit(1)


if __name__ == "__main__":
    main()

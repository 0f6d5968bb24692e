"""Kill processes of `sdbatch serve` at random moments under load, and check what it promises.

    python benchmarks/serve_faults.py [--minutes 10] [--output benchmarks/results/serve_faults]

Two replicas with the embedded model and `serve.keep`. Clients request images, streams, images by
URL and long jobs, all exact, while replicas, the Front and Ray's proxy are killed with SIGKILL.
What must hold, or the exit code is 1:

- A request ends with its image, or with 503 or 429 and a Retry-After. In a stream that has begun,
  the error is an event. Only if the proxy was killed, its connection may break.
- A long job that was accepted completes, and an image by URL can be fetched.
- Each image has the pixels that were drawn before the first kill.
- A killed process comes back. Linux only (/proc).
"""

import asyncio
import base64
import hashlib
import io
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import httpx
from findings import Findings
from PIL import Image
from serve_sides import DRAWER, FRONT, PROMPT, PROXY, REPLICAS, Served, sdbatch

SECTIONS = {
    "sampling": {"height": 64, "width": 64, "num_inference_steps": 12, "guidance_scale": 2.5},
    "engine": {"lanes": 4},
}
SETTINGS = {"queue": 64, "timeout_s": 120}
SEEDS = range(8)  # of all images, so that each has one to compare with
TITLES = {"replica": DRAWER, "front": FRONT, "proxy": PROXY}
WEIGHTS = {"replica": 5, "front": 3, "proxy": 2}  # how often each is killed
PAUSE_SECONDS = (2.0, 12.0)  # before a kill
WAIT_RATIO = 0.7  # of the kills, after which the next one waits until all processes are back
BACK_SECONDS = 180.0  # until a killed process is back, and until a long job has completed
RETRYABLE = (503, 429)
SHOWN = 20  # broken promises


class Retryable(Exception):
    """A response that tells the client to send the request again."""


class Broken(Exception):
    """A connection that broke because the proxy was killed."""


class BrokenPromise(Exception):
    """A response that must not be."""


@dataclass
class Kills:
    """What was killed, and when."""

    counts: Counter[str] = field(default_factory=Counter)
    seconds_to_be_back: dict[str, list[float]] = field(default_factory=dict)
    proxy_is_gone: bool = False
    proxy_was_back_at: float = 0.0  # of time.monotonic()

    def broke(self, started: float) -> bool:
        """Tell whether the proxy was gone at a moment since `started`."""
        return self.proxy_is_gone or self.proxy_was_back_at > started


@dataclass
class Outcomes:
    """How requests ended, by kind; and the promises that were broken."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    broken_promises: list[str] = field(default_factory=list)

    def add(self, kind: str, outcome: str) -> None:
        """Count a request."""
        self.counts.setdefault(kind, Counter())[outcome] += 1

    def break_promise(self, text: str) -> None:
        """Record a broken promise."""
        self.broken_promises.append(text)
        print(text, flush=True)


class Clients:
    """Requests of each kind, checked; each raises one of the exceptions above or returns.

    Args:
        http: sends them.
        kills: of the service's processes.
        pixels: the hashes of the right pixels by seed.
    """

    def __init__(self, http: httpx.AsyncClient, kills: Kills, pixels: dict[int, str]) -> None:
        self._http = http
        self._kills = kills
        self._pixels = pixels

    async def single(self, seed: int) -> None:
        """Request an image."""
        answer = await self._send("POST", "/v1/images/generations", json=_body(seed))
        self._check_image(seed, base64.b64decode(answer.json()["data"][0]["b64_json"]))

    async def by_url(self, seed: int) -> None:
        """Request an image by URL, and fetch it."""
        body = _body(seed, response_format="url")
        answer = await self._send("POST", "/v1/images/generations", json=body)
        url = answer.json()["data"][0]["url"]
        file = await self._until_answered(lambda: self._send("GET", url))
        self._check_image(seed, file.content)

    async def stream(self, seed: int) -> None:
        """Request an image as a stream of events with previews."""
        body = _body(seed, stream=True, partial_images=1)
        answer = await self._send("POST", "/v1/images/generations", json=body)
        events = [
            json.loads(line.removeprefix("data: "))
            for line in answer.text.splitlines()
            if line.startswith("data: ")
        ]
        last = events[-1] if events else {}
        if "error" in last:
            if last["error"]["type"] != "server_error" or last["error"]["code"] == "internal":
                raise BrokenPromise(f"a stream ended with {last}")
            raise Retryable(last["error"]["code"])
        if last.get("type") != "image_generation.completed":
            raise BrokenPromise(f"a stream ended without its image: {answer.text[-100:]!r}")
        self._check_image(seed, base64.b64decode(last["b64_json"]))

    async def long_job(self, seed: int) -> None:
        """Start a long job, and poll it until it has completed."""
        answer = await self._send("POST", "/v1/images/jobs", status=202, json=_body(seed))
        url, accepted = answer.json()["poll_url"], time.monotonic()
        while True:
            state = (await self._until_answered(lambda: self._send("GET", url))).json()
            if state["status"] not in ("queued", "drawing"):
                break
            if time.monotonic() > accepted + BACK_SECONDS:
                raise BrokenPromise(f"a long job did not complete: {state}")
            await asyncio.sleep(0.2)
        if state["status"] != "completed":
            raise BrokenPromise(f"a long job ended as {state}")
        self._check_image(seed, base64.b64decode(state["result"]["data"][0]["b64_json"]))

    async def _send(
        self, method: str, url: str, *, status: int = 200, **options: Any
    ) -> httpx.Response:
        """Return a response of the status; raise one of the exceptions above for another."""
        started = time.monotonic()
        try:
            answer = await self._http.request(method, url, **options)
        except httpx.TransportError as error:
            await asyncio.sleep(0.5)  # the proxy's death may be noticed later than its connection's
            if self._kills.broke(started):
                raise Broken from error
            raise BrokenPromise(f"{method} {url}: {error!r}, and the proxy was there") from error
        if answer.status_code in RETRYABLE and "retry-after" in answer.headers:
            raise Retryable(_code_of(answer))
        if answer.status_code != status:
            text = (
                f"{method} {url}: {answer.status_code} {dict(answer.headers)} {answer.text[:300]}"
            )
            raise BrokenPromise(text)
        return answer

    async def _until_answered(
        self, send: Callable[[], Awaitable[httpx.Response]]
    ) -> httpx.Response:
        """Send a request again until it is answered; it asks for what the service has accepted."""
        deadline = time.monotonic() + BACK_SECONDS
        while True:
            try:
                return await send()
            except (Retryable, Broken) as error:
                if time.monotonic() > deadline:
                    raise BrokenPromise(f"no answer in {BACK_SECONDS:.0f} s: {error!r}") from error
                await asyncio.sleep(0.5)

    def _check_image(self, seed: int, file: bytes) -> None:
        if hash_of_pixels(file) != self._pixels[seed]:
            raise BrokenPromise(f"the image of seed {seed} has other pixels than before")


def hash_of_pixels(file: bytes) -> str:
    """Return the sha256 of an image's pixels."""
    return hashlib.sha256(Image.open(io.BytesIO(file)).tobytes()).hexdigest()


def _body(seed: int, **more: Any) -> dict[str, Any]:
    return {"prompt": PROMPT, "seed": seed, "exact": True, **more}


def _code_of(answer: httpx.Response) -> str:
    try:
        return f"{answer.status_code} {answer.json()['error']['code']}"
    except (ValueError, KeyError, TypeError):
        return f"{answer.status_code}, not in the API's shape"


class Killer:
    """Kills processes of a service until it is stopped."""

    def __init__(self, service: Served, kills: Kills, outcomes: Outcomes, seed: int) -> None:
        self._service = service
        self._kills = kills
        self._outcomes = outcomes
        self._random = random.Random(seed)

    async def run(self, stop: asyncio.Event) -> None:
        """Kill one process after the other; at the end wait until all are back."""
        while not stop.is_set():
            await asyncio.sleep(self._random.uniform(*PAUSE_SECONDS))
            kinds = [*WEIGHTS]
            [kind] = self._random.choices(kinds, [WEIGHTS[kind] for kind in kinds])
            waits = self._random.random() < WAIT_RATIO or kind == "proxy"
            if pids := self._service.find(TITLES[kind]):
                await self._kill(kind, self._random.choice(pids), waits=waits)
        await self._wait_until_back("process")

    async def _kill(self, kind: str, pid: int, *, waits: bool) -> None:
        self._kills.proxy_is_gone |= kind == "proxy"
        os.kill(pid, signal.SIGKILL)
        self._kills.counts[kind] += 1
        print(f"{time.strftime('%H:%M:%S')} killed the {kind} {pid}", flush=True)
        if waits:
            started = time.monotonic()
            await self._wait_until_back(kind, pid)
            seconds = time.monotonic() - started
            self._kills.seconds_to_be_back.setdefault(kind, []).append(seconds)
        if kind == "proxy":
            self._kills.proxy_is_gone = False
            self._kills.proxy_was_back_at = time.monotonic()

    async def _wait_until_back(self, kind: str, pid: int | None = None) -> None:
        """Wait until the service is ready and has all processes, without the killed `pid`."""
        deadline = time.monotonic() + BACK_SECONDS
        while not await self._is_back(pid):
            if time.monotonic() > deadline:
                self._outcomes.break_promise(f"a {kind} was not back after {BACK_SECONDS:.0f} s")
                return
            await asyncio.sleep(0.5)

    async def _is_back(self, killed: int | None) -> bool:
        needed = {"replica": REPLICAS, "front": 1, "proxy": 1}
        for kind, title in TITLES.items():
            pids = self._service.find(title)
            if killed in pids or len(pids) < needed[kind]:
                return False
        try:
            async with httpx.AsyncClient(timeout=10) as http:
                return (await http.get(f"{self._service.url}/readyz")).status_code == 200
        except httpx.TransportError:
            return False


async def campaign(service: Served, minutes: float, clients: int, seed: int) -> dict[str, Any]:
    """Kill processes under load for some minutes; return the results by part."""
    kills, outcomes, stop = Kills(), Outcomes(), asyncio.Event()
    timeout = httpx.Timeout(SETTINGS["timeout_s"] + 60)
    async with httpx.AsyncClient(base_url=service.url, timeout=timeout) as http:
        pixels = await _draw_references(http)
        sends = Clients(http, kills, pixels)
        kinds = {
            "image": sends.single,
            "stream": sends.stream,
            "by URL": sends.by_url,
            "long job": sends.long_job,
        }

        async def run_client(number: int) -> None:
            chosen = random.Random(f"{seed} {number}")
            while not stop.is_set():
                kind, image_seed = chosen.choice([*kinds]), chosen.choice(SEEDS)
                try:
                    await kinds[kind](image_seed)
                    outcomes.add(kind, "image")
                except Retryable as error:
                    outcomes.add(kind, f"retry: {error}")
                    await asyncio.sleep(0.5)
                except Broken:
                    outcomes.add(kind, "connection broken, proxy killed")
                    await asyncio.sleep(0.5)
                except BrokenPromise as error:
                    outcomes.add(kind, "PROMISE BROKEN")
                    outcomes.break_promise(f"{time.strftime('%H:%M:%S')} {kind}: {error}")

        killer = asyncio.create_task(Killer(service, kills, outcomes, seed).run(stop))
        tasks = [asyncio.create_task(run_client(number)) for number in range(clients)]
        await asyncio.sleep(60 * minutes)
        stop.set()
        await asyncio.gather(killer, *tasks)
    back = kills.seconds_to_be_back.items()
    return {
        "kills": {
            kind: {"killed": number, "longest s until all is back": round(max(times, default=0), 1)}
            for kind, number in sorted(kills.counts.items())
            for times in [dict(back).get(kind, [])]
        },
        "requests": {kind: dict(counts) for kind, counts in sorted(outcomes.counts.items())},
        "broken promises": {
            "number": len(outcomes.broken_promises),
            **{str(at): text for at, text in enumerate(outcomes.broken_promises[:SHOWN])},
        },
    }


async def _draw_references(http: httpx.AsyncClient) -> dict[int, str]:
    """Draw the image of each seed while nothing is killed; return the hashes of their pixels."""
    pixels = {}
    for seed in SEEDS:
        answer = await http.post("/v1/images/generations", json=_body(seed))
        answer.raise_for_status()
        file = base64.b64decode(answer.json()["data"][0]["b64_json"])
        pixels[seed] = hash_of_pixels(file)
    return pixels


@click.command()
@click.option("--minutes", default=10.0, help="For which processes are killed.")
@click.option("--clients", default=12, help="At a time.")
@click.option("--seed", default=0, help="Of the kills and of the requests.")
@click.option(
    "--output", type=click.Path(path_type=Path), help="Path of the results, without .json and .md."
)
def main(minutes: float, clients: int, seed: int, output: Path | None) -> None:
    """Kill processes of the service under load; the exit code is 1 if a promise was broken."""
    findings = Findings(output)
    findings.add(
        "campaign",
        {"date": time.strftime("%Y-%m-%d"), "minutes": minutes, "clients": clients, "seed": seed},
    )
    with (
        tempfile.TemporaryDirectory() as folder,
        sdbatch(sections=SECTIONS, keep=f"{folder}/keep", **SETTINGS) as service,
    ):
        results = asyncio.run(campaign(service, minutes, clients, seed))
    for part, found in results.items():
        findings.add(part, found)
    if results["broken promises"]["number"]:
        sys.exit(1)


if __name__ == "__main__":
    main()

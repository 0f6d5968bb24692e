"""Slow bodies, slow headers and idle connections: an attack on a service's connections.

`attack(url)` holds them open around what is measured meanwhile (benchmarks/serve.py, tests/ray).
A connection that the service closes is opened again, as an attacker would. Alone it attacks a
service that runs, and prints how its probes and its images fare:

    python benchmarks/serve_attack.py http://127.0.0.1:8000 --seconds 60
"""

import argparse
import asyncio
import json
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httpx

BYTE_SECONDS = 1.0  # between two bytes of a slow header or body
PAUSE_SECONDS = 0.2  # before a closed connection is opened again
PROBES = ("/healthz", "/readyz")


@dataclass
class Attack:
    """What the attacking connections have seen.

    Attributes:
        open: connections that are open now, by kind.
        most_open: the most that were open at a time, by kind.
        answers: the statuses of responses, by kind and status.
        closed: connections that the service closed without a response, by kind.
    """

    open: Counter[str] = field(default_factory=Counter)
    most_open: Counter[str] = field(default_factory=Counter)
    answers: Counter[tuple[str, int]] = field(default_factory=Counter)
    closed: Counter[str] = field(default_factory=Counter)


@asynccontextmanager
async def attack(
    url: str, *, bodies: int = 600, headers: int = 100, idle: int = 200, key: str | None = None
) -> AsyncIterator[Attack]:
    """Hold slow connections to the service at `url` open, and yield what they have seen.

    Args:
        url: of the service, http.
        bodies: connections that send one byte of a request's body, and then one a second.
        headers: connections whose headers never end.
        idle: connections that send nothing.
        key: an API key for the slow bodies; None: they send none.
    """
    parts = urlsplit(url)
    address = (parts.hostname or "127.0.0.1", parts.port or 80)
    host = f"Host: {parts.netloc}\r\n"
    sent_key = f"Authorization: Bearer {key}\r\n" if key else ""
    body = (
        f"POST {parts.path.rstrip('/')}/v1/images/generations HTTP/1.1\r\n{host}{sent_key}"
        "Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{"
    )
    starts = {"body": (body, bodies), "header": (f"GET / HTTP/1.1\r\n{host}X-Slow: ", headers)}
    starts["idle"] = ("", idle)
    seen = Attack()
    tasks = [
        asyncio.ensure_future(_hold(address, kind, start.encode(), seen))
        for kind, (start, count) in starts.items()
        for _ in range(count)
    ]
    try:
        yield seen
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _hold(address: tuple[str, int], kind: str, start: bytes, seen: Attack) -> None:
    """Open connections of a kind, one after the other, each for as long as the service lets it."""
    while True:
        try:
            reader, writer = await asyncio.open_connection(*address)
        except OSError:
            await asyncio.sleep(PAUSE_SECONDS)
            continue
        seen.open[kind] += 1
        seen.most_open[kind] = max(seen.most_open[kind], seen.open[kind])
        sending = asyncio.ensure_future(_send(writer, start))
        try:
            line = await reader.readline()
        except OSError:
            line = b""
        finally:
            sending.cancel()
            seen.open[kind] -= 1
            writer.close()
        words = line.split()
        if len(words) > 1 and words[1].isdigit():
            seen.answers[kind, int(words[1])] += 1
        else:
            seen.closed[kind] += 1
        await asyncio.sleep(PAUSE_SECONDS)


async def _send(writer: asyncio.StreamWriter, start: bytes) -> None:
    """Send the beginning of a request, and then a byte from time to time."""
    writer.write(start)
    while start:
        await asyncio.sleep(BYTE_SECONDS)
        writer.write(b" ")


async def probe_times(client: httpx.AsyncClient, seconds: float) -> dict[str, list[float]]:
    """Request the probes and an image in turn for some seconds; return the times of 200s.

    A request that takes more than the client's timeout, or has another status, counts as infinity.
    """
    times: dict[str, list[float]] = {path: [] for path in (*PROBES, "image")}
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for path in times:
            started = time.monotonic()
            try:
                if path == "image":
                    body = {"prompt": "a red circle"}
                    answer = await client.post("/v1/images/generations", json=body)
                else:
                    answer = await client.get(path)
                passed = answer.status_code == 200
            except httpx.TransportError:
                passed = False
            times[path].append(time.monotonic() - started if passed else float("inf"))
        await asyncio.sleep(0.1)
    return times


async def _measure(url: str, seconds: float, key: str | None) -> dict[str, object]:
    sent_key = {"Authorization": f"Bearer {key}"} if key else {}
    async with (
        httpx.AsyncClient(base_url=url, timeout=10, headers=sent_key) as client,
        attack(url, key=key) as seen,
    ):
        await asyncio.sleep(5)  # until all connections are open
        times = await probe_times(client, seconds)
        return {
            "seconds": {
                path: {"p50": statistics.median(each), "max": max(each), "requests": len(each)}
                for path, each in times.items()
            },
            "most open": dict(seen.most_open),
            "answers": {f"{kind} {status}": n for (kind, status), n in seen.answers.items()},
            "closed": dict(seen.closed),
        }


def main() -> None:
    """Attack a service and print how its probes and images fare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--key", default=None, help="API key of the attacker and of the probes")
    arguments = parser.parse_args()
    print(json.dumps(asyncio.run(_measure(arguments.url, arguments.seconds, arguments.key))))


if __name__ == "__main__":
    main()

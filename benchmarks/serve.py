"""`sdbatch serve` under load, beside Ray Serve's documented Stable Diffusion example.

    python benchmarks/serve.py [--clients 1,8,32,128] [--requests 10000]
        --output benchmarks/results/serve

Each side runs alone, as two replicas of one CPU on the embedded model (128x128, 25 steps, guided,
PNG), and is asked from this process over loopback by so many clients, each of which sends its next
request when it has its answer. Then, of sdbatch alone: more clients than the queue holds, a replica
that is killed, and the memory of its processes over many small requests. Linux only (/proc).
"""

import asyncio
import os
import platform
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import click
import httpx
from findings import Findings, versions
from serve_sides import (
    PROMPT,
    REPLICAS,
    ask_example,
    ask_little,
    ask_sdbatch,
    example,
    load,
    sdbatch,
)

FEWEST, EACH = 24, 4  # requests of a measurement: so many, or so many a client


def compare(clients: list[int]) -> dict[str, dict[str, Any]]:
    """Load both sides with the same numbers of clients, the second after the first."""
    found: dict[str, dict[str, Any]] = {}
    for name, side, ask in (
        ("sdbatch", sdbatch(), ask_sdbatch),
        ("example", example(), ask_example),
    ):
        with side as url:
            asyncio.run(load(url, ask, 2 * REPLICAS, 4 * REPLICAS))  # both replicas are warm
            for number in clients:
                requests = max(FEWEST, EACH * number)
                key = f"{number} clients, {name}"
                found[key] = asyncio.run(load(url, ask, number, requests))
                print(key, found[key], flush=True)
    for number in clients:
        ours, theirs = (found[f"{number} clients, {name}"] for name in ("sdbatch", "example"))
        ours["times the example"] = round(ours["images/s"] / theirs["images/s"], 2)
    return dict(sorted(found.items(), key=lambda item: int(item[0].split()[0])))


def alone() -> dict[str, dict[str, Any]]:
    """Ask by one client for images whose bits may differ, and for exact ones."""
    found = {}
    with sdbatch(replicas=1) as url:
        for name, exact in (("within rounding", False), ("exact", True)):

            async def ask(client: httpx.AsyncClient, number: int, exact: bool = exact) -> int:
                asked = {"prompt": PROMPT, "seed": number, "exact": exact}
                return (await client.post("/v1/images/generations", json=asked)).status_code

            asyncio.run(load(url, ask, 1, 2))
            found[name] = asyncio.run(load(url, ask, 1, 12))
    return found


def counted(url: str, name: str) -> float:
    """Return a number of the service's own metrics."""
    lines = httpx.get(f"{url}/metrics", timeout=60).text.splitlines()
    return next(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


def overload() -> dict[str, Any]:
    """Load it with twice the clients that its queue holds."""
    queue = 16
    with sdbatch(queue=queue) as url:
        found = asyncio.run(load(url, ask_sdbatch, 2 * queue, 200))
        drawn = counted(url, 'sdbatch_images_total{outcome="drawn"}')
    lost = drawn - found["answered"].get(200, 0)
    return {"clients": 2 * queue, "queue": queue, **found, "drawn and not delivered": lost}


def drawers() -> list[int]:
    """Return the processes of the replicas that draw."""
    done = subprocess.run(["pgrep", "-f", "ServeReplica:.*Drawer"], capture_output=True, text=True)
    return [int(line) for line in done.stdout.split()]


def killed(replicas: int) -> dict[str, Any]:
    """Kill one of the replicas under load; count what failed and the seconds until it is back."""
    with sdbatch(replicas) as url:
        return asyncio.run(_killed(url, replicas))


async def _killed(url: str, replicas: int) -> dict[str, Any]:
    answers: list[tuple[float, int]] = []
    stop = asyncio.Event()
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:

        async def one(number: int) -> None:
            while not stop.is_set():
                status = await ask_sdbatch(client, number)
                answers.append((time.perf_counter(), status))
                if status != 200:
                    await asyncio.sleep(0.2)

        asking = [asyncio.create_task(one(number)) for number in range(8)]
        await asyncio.sleep(8)
        processes = drawers()
        before = len(answers)
        os.kill(processes[0], signal.SIGKILL)
        at = time.perf_counter()
        while set(drawers()) & set(processes[:1]) or len(drawers()) < replicas:
            await asyncio.sleep(0.1)
        process_back = time.perf_counter() - at
        await asyncio.sleep(25)
        stop.set()
        await asyncio.gather(*asking)
    after = answers[before:]
    good = [when - at for when, status in after if status == 200]
    return {
        "clients": 8,
        "answers before": before,
        "failed, with 503": sum(status == 503 for _, status in after),
        "failed otherwise": sum(status not in (200, 503) for _, status in after),
        "s to the next image": round(good[0], 2),
        "longest s without an image": round(
            max(b - a for a, b in zip([0.0, *good], good, strict=False)), 2
        ),
        "s to a new process": round(process_back, 2),
    }


def scaled() -> dict[str, Any]:
    """Load one replica that may become two; tell when the second was there, and the rate since."""
    with sdbatch(replicas=1, max_replicas=REPLICAS) as url:
        return asyncio.run(_scaled(url))


async def _scaled(url: str) -> dict[str, Any]:
    stop = asyncio.Event()
    when: list[float] = []
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:

        async def one(number: int) -> None:
            while not stop.is_set():
                await ask_sdbatch(client, number)
                when.append(time.perf_counter())

        began = time.perf_counter()
        asking = [asyncio.create_task(one(number)) for number in range(32)]
        while len(drawers()) < REPLICAS and time.perf_counter() - began < 120:
            await asyncio.sleep(0.2)
        second = time.perf_counter() - began
        await asyncio.sleep(60)  # it loads for a part of them
        now = time.perf_counter()
        stop.set()
        await asyncio.gather(*asking)
    return {
        "clients": 32,
        "s to the second process": round(second, 1),
        "images/s before it": round(sum(at < began + second for at in when) / second, 2),
        "images/s in the last 20 s": round(sum(now - 20 < at <= now for at in when) / 20, 2),
    }


def memory(requests: int) -> dict[str, Any]:
    """Watch the memory of the service's processes over many small requests, MiB."""
    with sdbatch(replicas=1) as url:
        found = {}
        for part in range(11):
            if part:
                asyncio.run(load(url, ask_little, 16, requests // 10))
            found[f"after {part * requests // 10}"] = _resident()
            print(found[f"after {part * requests // 10}"], flush=True)
    return found


def _resident() -> dict[str, float]:
    """Return the resident memory of the front, the drawer and the proxy."""
    found = {}
    for name, pattern in (
        ("front", "ServeReplica:.*Front"),
        ("drawer", "ServeReplica:.*Drawer"),
        ("proxy", "ProxyActor"),
    ):
        pids = subprocess.run(["pgrep", "-f", f"ray::{pattern}"], capture_output=True, text=True)
        pages = sum(
            int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids.stdout.split()
        )
        found[f"{name} MiB"] = round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)
    return found


@click.command()
@click.option("--clients", default="1,8,32,128")
@click.option("--requests", default=10_000, help="Of the look at memory.")
@click.option("--output", type=click.Path(path_type=Path), help="Where .json and .md go.")
def main(clients: str, requests: int, output: Path | None) -> None:
    """Measure the service."""
    findings = Findings(output)
    device = f"{platform.machine()}, {os.cpu_count()} cores"
    findings.add("machine", {"device": device, "date": time.strftime("%Y-%m-%d"), **versions()})
    findings.add("load", compare([int(number) for number in clients.split(",")]))
    findings.add("one client, one replica", alone())
    findings.add("overload", overload())
    findings.add("a replica killed, of 2", killed(2))
    findings.add("the replica killed, of 1", killed(1))
    findings.add("one replica that may become two", scaled())
    findings.add("memory", memory(requests))


if __name__ == "__main__":
    main()

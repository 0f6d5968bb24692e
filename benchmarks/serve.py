"""`sdbatch serve` under load, compared with Ray Serve's documented Stable Diffusion example.

    python benchmarks/serve.py [--clients 1,8,32,128] [--requests 10000]
        --output benchmarks/results/serve

Each service runs alone, with two replicas of one CPU each, on the embedded model (128x128, 25
steps, guided, PNG). This process sends requests over loopback from N clients; each client sends its
next request after the response to its last. Then, for sdbatch only: more clients than the queue
holds, a replica that is killed, and the memory of its processes over many small requests. Linux
only (/proc).
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
    example,
    load,
    sdbatch,
    send_small,
    send_to_example,
    send_to_sdbatch,
)

from sdbatch.cores import cores

MIN_REQUESTS, REQUESTS_PER_CLIENT = 24, 4  # of a measurement: the larger number


def compare(clients: list[int]) -> dict[str, dict[str, Any]]:
    """Measure both services with the same numbers of clients, one after the other."""
    results: dict[str, dict[str, Any]] = {}
    for name, service, send in (
        ("sdbatch", sdbatch(), send_to_sdbatch),
        ("example", example(), send_to_example),
    ):
        with service as url:
            asyncio.run(load(url, send, 2 * REPLICAS, 4 * REPLICAS))  # warm up both replicas
            for number in clients:
                requests = max(MIN_REQUESTS, REQUESTS_PER_CLIENT * number)
                key = f"{number} clients, {name}"
                results[key] = asyncio.run(load(url, send, number, requests))
                print(key, results[key], flush=True)
    for number in clients:
        ours, theirs = (results[f"{number} clients, {name}"] for name in ("sdbatch", "example"))
        ours["times the example"] = round(ours["images/s"] / theirs["images/s"], 2)
    return dict(sorted(results.items(), key=lambda item: int(item[0].split()[0])))


def alone() -> dict[str, dict[str, Any]]:
    """Measure one client: images that may differ by rounding, and exact ones."""
    results = {}
    with sdbatch(replicas=1) as url:
        for name, exact in (("within rounding", False), ("exact", True)):

            async def send(client: httpx.AsyncClient, number: int, exact: bool = exact) -> int:
                body = {"prompt": PROMPT, "seed": number, "exact": exact}
                return (await client.post("/v1/images/generations", json=body)).status_code

            asyncio.run(load(url, send, 1, 2))
            results[name] = asyncio.run(load(url, send, 1, 12))
    return results


def read_metric(url: str, name: str) -> float:
    """Return the value of one of the service's metrics."""
    lines = httpx.get(f"{url}/metrics", timeout=60).text.splitlines()
    return next(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


def overload() -> dict[str, Any]:
    """Measure twice as many clients as the queue holds."""
    queue = 16
    with sdbatch(queue=queue) as url:
        results = asyncio.run(load(url, send_to_sdbatch, 2 * queue, 200))
        drawn = read_metric(url, 'sdbatch_images_total{outcome="drawn"}')
    lost = drawn - results["answered"].get(200, 0)
    return {"clients": 2 * queue, "queue": queue, **results, "drawn and not delivered": lost}


def drawer_pids() -> list[int]:
    """Return the process ids of the replicas that draw."""
    process = subprocess.run(
        ["pgrep", "-f", "ServeReplica:.*Drawer"], capture_output=True, text=True
    )
    return [int(line) for line in process.stdout.split()]


def killed(replicas: int) -> dict[str, Any]:
    """Kill one replica under load; count the failed requests and the seconds until it is back."""
    with sdbatch(replicas) as url:
        return asyncio.run(_killed(url, replicas))


async def _killed(url: str, replicas: int) -> dict[str, Any]:
    answers: list[tuple[float, int]] = []
    stop = asyncio.Event()
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:

        async def run_client(number: int) -> None:
            while not stop.is_set():
                status = await send_to_sdbatch(client, number)
                answers.append((time.perf_counter(), status))
                if status != 200:
                    await asyncio.sleep(0.2)

        clients = [asyncio.create_task(run_client(number)) for number in range(8)]
        await asyncio.sleep(8)
        processes = drawer_pids()
        before = len(answers)
        os.kill(processes[0], signal.SIGKILL)
        at = time.perf_counter()
        while set(drawer_pids()) & set(processes[:1]) or len(drawer_pids()) < replicas:
            await asyncio.sleep(0.1)
        process_back = time.perf_counter() - at
        await asyncio.sleep(25)
        stop.set()
        await asyncio.gather(*clients)
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
    """Measure one replica that may become two: when the second starts, and the rate after it."""
    with sdbatch(replicas=1, max_replicas=REPLICAS) as url:
        return asyncio.run(_scaled(url))


async def _scaled(url: str) -> dict[str, Any]:
    stop = asyncio.Event()
    when: list[float] = []
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:

        async def run_client(number: int) -> None:
            while not stop.is_set():
                await send_to_sdbatch(client, number)
                when.append(time.perf_counter())

        started = time.perf_counter()
        clients = [asyncio.create_task(run_client(number)) for number in range(32)]
        while len(drawer_pids()) < REPLICAS and time.perf_counter() - started < 120:
            await asyncio.sleep(0.2)
        second = time.perf_counter() - started
        await asyncio.sleep(60)  # the new replica loads the model during a part of them
        now = time.perf_counter()
        stop.set()
        await asyncio.gather(*clients)
    return {
        "clients": 32,
        "s to the second process": round(second, 1),
        "images/s before it": round(sum(at < started + second for at in when) / second, 2),
        "images/s in the last 20 s": round(sum(now - 20 < at <= now for at in when) / 20, 2),
    }


def memory(requests: int) -> dict[str, Any]:
    """Measure the memory of the service's processes over many small requests, in MiB."""
    with sdbatch(replicas=1) as url:
        results = {}
        for part in range(11):
            if part:
                asyncio.run(load(url, send_small, 16, requests // 10))
            results[f"after {part * requests // 10}"] = _resident()
            print(results[f"after {part * requests // 10}"], flush=True)
    return results


def _resident() -> dict[str, float]:
    """Return the resident memory of the front, the drawer and the proxy."""
    results = {}
    for name, pattern in (
        ("front", "ServeReplica:.*Front"),
        ("drawer", "ServeReplica:.*Drawer"),
        ("proxy", "ProxyActor"),
    ):
        pids = subprocess.run(["pgrep", "-f", f"ray::{pattern}"], capture_output=True, text=True)
        pages = sum(
            int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids.stdout.split()
        )
        results[f"{name} MiB"] = round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)
    return results


@click.command()
@click.option("--clients", default="1,8,32,128")
@click.option("--requests", default=10_000, help="Requests of the memory measurement.")
@click.option(
    "--output", type=click.Path(path_type=Path), help="Path of the results, without .json and .md."
)
def main(clients: str, requests: int, output: Path | None) -> None:
    """Measure the service."""
    findings = Findings(output)
    device = f"{platform.machine()}, {cores()} cores"
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

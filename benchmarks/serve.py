"""`sdbatch serve` under load, compared with Ray Serve's documented Stable Diffusion example.

    python benchmarks/serve.py [--clients 1,8,32,128] [--requests 10000] [--part NAME]...
        --output benchmarks/results/serve

Each service runs alone, with two replicas of one CPU each, on the embedded model (128x128, 25
steps, guided, PNG). This process sends requests over loopback from N clients; each client sends its
next request after the response to its last. Then, for sdbatch only: more clients than the queue
holds, small images with large ones, two API keys, slow connections (serve_mixed.py), a replica
that is killed, and the memory of its processes over many small requests. Linux only (/proc).
"""

import asyncio
import os
import platform
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import httpx
from findings import Findings, versions
from serve_mixed import attacked, mixed, two_keys
from serve_sides import (
    DRAWER,
    PROMPT,
    REPLICAS,
    Served,
    example,
    load,
    resident,
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
        with service as served:
            url = served.url
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
    with sdbatch(replicas=1) as served:
        for name, exact in (("within rounding", False), ("exact", True)):

            async def send(client: httpx.AsyncClient, number: int, exact: bool = exact) -> int:
                body = {"prompt": PROMPT, "seed": number, "exact": exact}
                return (await client.post("/v1/images/generations", json=body)).status_code

            asyncio.run(load(served.url, send, 1, 2))
            results[name] = asyncio.run(load(served.url, send, 1, 12))
    return results


def read_metric(url: str, name: str) -> float:
    """Return the value of one of the service's metrics."""
    lines = httpx.get(f"{url}/metrics", timeout=60).text.splitlines()
    return next(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


def overload() -> dict[str, Any]:
    """Measure twice as many clients as the queue holds."""
    queue = 16
    with sdbatch(queue=queue) as served:
        results = asyncio.run(load(served.url, send_to_sdbatch, 2 * queue, 200))
        drawn = read_metric(served.url, 'sdbatch_images_total{outcome="drawn"}')
    lost = drawn - results["answered"].get(200, 0)
    return {"clients": 2 * queue, "queue": queue, **results, "drawn and not delivered": lost}


def killed(replicas: int) -> dict[str, Any]:
    """Kill one replica under load; count the failed requests and the seconds until it is back."""
    with sdbatch(replicas) as served:
        return asyncio.run(_killed(served, replicas))


async def _killed(served: Served, replicas: int) -> dict[str, Any]:
    answers: list[tuple[float, int]] = []
    stop = asyncio.Event()
    async with httpx.AsyncClient(base_url=served.url, timeout=600) as client:

        async def run_client(number: int) -> None:
            while not stop.is_set():
                status = await send_to_sdbatch(client, number)
                answers.append((time.perf_counter(), status))
                if status != 200:
                    await asyncio.sleep(0.2)

        clients = [asyncio.create_task(run_client(number)) for number in range(8)]
        await asyncio.sleep(8)
        processes = served.find(DRAWER)
        before = len(answers)
        os.kill(processes[0], signal.SIGKILL)
        at = time.perf_counter()
        while set(pids := served.find(DRAWER)) & set(processes[:1]) or len(pids) < replicas:
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
    with sdbatch(replicas=1, max_replicas=REPLICAS) as served:
        return asyncio.run(_scaled(served))


async def _scaled(served: Served) -> dict[str, Any]:
    stop = asyncio.Event()
    when: list[float] = []
    async with httpx.AsyncClient(base_url=served.url, timeout=600) as client:

        async def run_client(number: int) -> None:
            while not stop.is_set():
                await send_to_sdbatch(client, number)
                when.append(time.perf_counter())

        started = time.perf_counter()
        clients = [asyncio.create_task(run_client(number)) for number in range(32)]
        while len(served.find(DRAWER)) < REPLICAS and time.perf_counter() - started < 120:
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
    with sdbatch(replicas=1) as served:
        results = {}
        for part in range(11):
            if part:
                asyncio.run(load(served.url, send_small, 16, requests // 10))
            results[f"after {part * requests // 10}"] = resident(served)
            print(results[f"after {part * requests // 10}"], flush=True)
    return results


def _parts(clients: list[int], requests: int) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return what is measured, by name."""
    return {
        "load": partial(compare, clients),
        "one client, one replica": alone,
        "overload": overload,
        "small with large": mixed,
        "two keys": two_keys,
        "slow connections": attacked,
        "a replica killed, of 2": partial(killed, 2),
        "the replica killed, of 1": partial(killed, 1),
        "one replica that may become two": scaled,
        "memory": partial(memory, requests),
    }


@click.command()
@click.option("--clients", default="1,8,32,128")
@click.option("--requests", default=10_000, help="Requests of the memory measurement.")
@click.option("--part", "names", multiple=True, help="Measure this alone; may be repeated.")
@click.option(
    "--output", type=click.Path(path_type=Path), help="Path of the results, without .json and .md."
)
def main(clients: str, requests: int, names: tuple[str, ...], output: Path | None) -> None:
    """Measure the service."""
    parts = _parts([int(number) for number in clients.split(",")], requests)
    unknown = [name for name in names if name not in parts]
    if unknown:
        raise click.UsageError(f"--part {unknown[0]!r}: must be one of {', '.join(parts)}.")
    findings = Findings(output)
    device = f"{platform.machine()}, {cores()} cores"
    findings.add("machine", {"device": device, "date": time.strftime("%Y-%m-%d"), **versions()})
    for name in names or parts:
        findings.add(name, parts[name]())


if __name__ == "__main__":
    main()

"""Parts of benchmarks/serve.py: what requests, keys and connections do to each other."""

import asyncio
import statistics
import time
from typing import Any

import httpx
from serve_attack import attack, probe_times
from serve_sides import PROMPT, latencies, load, sdbatch

CLIENTS = 8
SMALL = {"size": "64x64"}
LARGE = {"size": "512x512", "num_inference_steps": 40}
EVERY = 10  # the last one of so many requests is large
SMALL_REQUESTS = 180
KEYS = {"greedy": "greedy-key-of-the-benchmark", "other": "other-key-of-the-benchmark"}
GREEDY_CLIENTS, KEY_QUEUE, OTHER_REQUESTS = 16, 8, 19
ATTACK_SECONDS, CONNECTING_SECONDS = 30.0, 5.0


def mixed() -> dict[str, dict[str, Any]]:
    """Measure small images alone, and with one large one in ten."""

    async def send(client: httpx.AsyncClient, number: int, *, with_large: bool) -> int:
        more = LARGE if with_large and is_large(number) else SMALL
        body = {"prompt": PROMPT, "seed": number, **more}
        return (await client.post("/v1/images/generations", json=body)).status_code

    async def send_small(client: httpx.AsyncClient, number: int) -> int:
        return await send(client, number, with_large=False)

    async def send_either(client: httpx.AsyncClient, number: int) -> int:
        return await send(client, number, with_large=True)

    def is_large(number: int) -> bool:
        return number % EVERY == EVERY - 1

    def is_small(number: int) -> bool:
        return not is_large(number)

    requests = SMALL_REQUESTS * EVERY // (EVERY - 1)
    with sdbatch() as service:
        asyncio.run(load(service.url, send_either, CLIENTS, 2 * EVERY))  # warm up both sizes
        return {
            "small ones, without large ones": asyncio.run(
                load(service.url, send_small, CLIENTS, SMALL_REQUESTS)
            ),
            "small ones, one in ten large": asyncio.run(
                load(service.url, send_either, CLIENTS, requests, is_measured=is_small)
            ),
        }


def two_keys() -> dict[str, dict[str, Any]]:
    """Measure a key that sends one request after the other: alone, and with a greedy one."""
    environment = {"SDBATCH_API_KEYS": ",".join(KEYS.values())}
    with sdbatch(environment=environment, queue=KEY_QUEUE) as service:
        return asyncio.run(_two_keys(service.url))


async def _two_keys(url: str) -> dict[str, dict[str, Any]]:
    stop = asyncio.Event()
    answers: dict[str, list[tuple[int, float]]] = {"greedy": []}

    async def send(client: httpx.AsyncClient, name: str) -> None:
        started = time.perf_counter()
        headers = {"Authorization": f"Bearer {KEYS[name.partition(',')[0]]}"}
        body = {"prompt": PROMPT}
        answer = await client.post("/v1/images/generations", json=body, headers=headers)
        answers.setdefault(name, []).append((answer.status_code, time.perf_counter() - started))
        if answer.status_code != 200:
            await asyncio.sleep(0.2)

    async def run_greedy(client: httpx.AsyncClient) -> None:
        while not stop.is_set():
            await send(client, "greedy")

    limits = httpx.Limits(max_connections=GREEDY_CLIENTS + 1)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        for _ in range(OTHER_REQUESTS):
            await send(client, "other, alone")
        greedy = [asyncio.create_task(run_greedy(client)) for _ in range(GREEDY_CLIENTS)]
        await asyncio.sleep(5)  # until they fill the queue
        for _ in range(OTHER_REQUESTS):
            await send(client, "other, with the greedy one")
        stop.set()
        await asyncio.gather(*greedy)
    return {name: _answers_of(each) for name, each in sorted(answers.items())}


def _answers_of(answers: list[tuple[int, float]]) -> dict[str, Any]:
    drawn = [seconds for status, seconds in answers if status == 200]
    return {
        "requests": len(answers),
        "drawn": len(drawn),
        **(latencies(drawn) if drawn else {}),
    }


def attacked() -> dict[str, dict[str, Any]]:
    """Measure the probes and an image: alone, and while connections are held open."""
    with sdbatch() as service:
        return asyncio.run(_attacked(service.url))


async def _attacked(url: str) -> dict[str, dict[str, Any]]:
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        before = await probe_times(client, ATTACK_SECONDS)
        async with attack(url) as seen:
            await asyncio.sleep(CONNECTING_SECONDS)
            meanwhile = await probe_times(client, ATTACK_SECONDS)
            connections = dict(seen.open)
    results = {}
    for name, times in (("alone", before), ("attacked", meanwhile)):
        for path, seconds in times.items():
            results[f"{path}, {name}"] = {
                "requests": len(seconds),
                "p50 s": round(statistics.median(seconds), 3),
                "longest s": round(max(seconds), 3),
            }
    return {**results, "connections held open": connections}

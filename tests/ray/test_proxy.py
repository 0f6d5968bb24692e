"""Ray's HTTP proxy in front of the service: an attack on its connections, and a Front that dies.

tests/serve has the same code without Ray, with short time limits.
"""

import asyncio
import os
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from benchmarks.serve_attack import PROBES, attack
from tests.ray.processes import find_process
from tests.ray.test_serve import JOB, serving
from tests.wait import wait_until

BODIES, HEADERS, IDLE = 600, 100, 200
SECONDS = 120
# Some seconds of work for one core.
HELD = {"prompt": "a dog", "num_inference_steps": 150, "size": "256x256"}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("served"), JOB) as served:
        yield served


def test_the_command_says_where_the_log_is(served):
    wait_until(lambda: "serving" in served.said)
    [pattern] = re.findall(r"^log: (.+)$", served.said, re.M)
    served.client.get("/v1/models", headers={"X-Request-ID": "a-request-of-the-test"})
    [file] = Path(pattern).parent.glob(Path(pattern).name)
    wait_until(lambda: "a-request-of-the-test" in file.read_text())


def test_a_response_has_one_request_id(served):
    answer = served.client.get("/nowhere", headers={"X-Request-ID": "mine-1"})
    assert answer.headers.get_list("x-request-id") == ["mine-1"]
    assert served.client.head("/readyz").status_code == 200


def test_slow_bodies_slow_headers_and_idle_connections_stop_neither_probes_nor_images(served):
    asyncio.run(draw_under_attack(served.url))


async def draw_under_attack(url):
    async with (
        httpx.AsyncClient(base_url=url, timeout=SECONDS) as client,
        attack(url, bodies=BODIES, headers=HEADERS, idle=IDLE) as seen,
        asyncio.timeout(SECONDS),
    ):
        while seen.most_open != {"body": BODIES, "header": HEADERS, "idle": IDLE}:
            await asyncio.sleep(0.1)
        while not (
            seen.answers["body", 429]  # no slot
            and seen.answers["body", 408]
            and seen.answers["header", 408]
            and seen.closed["idle"]
        ):
            for path in PROBES:
                assert (await client.get(path)).status_code == 200
            drawn = await client.post("/v1/images/generations", json={"prompt": "a dog"})
            assert drawn.status_code == 200
    assert {status for _, status in seen.answers} == {408, 429}


def test_a_killed_front_is_a_retryable_error_and_is_there_again(served):
    with ThreadPoolExecutor(2) as pool:
        held = pool.submit(served.post, **HELD)
        streamed = pool.submit(served.post, **HELD, stream=True)
        served.wait_for_open(2)
        os.kill(find_process(served.ray_folder, ":Front"), signal.SIGKILL)
        answer = held.result()
        assert served.client.get("/healthz").status_code == 200
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "5"
    assert answer.json()["error"]["code"] == "front_lost"
    assert "event: error" in streamed.result().text
    assert "front_lost" in streamed.result().text
    wait_until(lambda: served.client.get("/readyz").status_code == 200, SECONDS)
    assert served.post().status_code == 200

"""`sdbatch serve` with `serve.keep`: its Front is killed and comes back."""

import contextlib
import os
import signal

import httpx
import pytest

from tests.ray.processes import find_process
from tests.ray.test_serve import JOB, serving
from tests.wait import wait_until

LONG = {"prompt": "a dog", "num_inference_steps": 150, "size": "256x256", "exact": True}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    settings = {"keep": "kept", "timeout_s": 300, "max_replicas": 1}
    with serving(tmp_path_factory.mktemp("served"), {**JOB, "serve": settings}) as served:
        yield served


def poll(served, path):
    """Return the state of a long job; None while no Front answers."""
    with contextlib.suppress(httpx.TransportError):
        answer = served.client.get(path)
        if answer.status_code == 200:
            return answer.json()
        assert answer.status_code >= 500, answer.text
    return None


def test_a_killed_front_loses_no_accepted_job_and_no_image_by_url(served):
    image = served.post(response_format="url").json()["data"][0]
    file = served.client.get(image["url"]).content
    begun = served.client.post("/v1/images/jobs", json={**LONG, "response_format": "url"})
    assert begun.status_code == 202
    path = begun.json()["poll_url"]
    wait_until(lambda: poll(served, path)["status"] == "drawing")
    front = find_process(served.ray_folder, ":Front")
    os.kill(front, signal.SIGKILL)
    wait_until(lambda: find_process(served.ray_folder, ":Front") not in (front, None), 120)
    wait_until(lambda: (poll(served, path) or {}).get("status") == "completed", 200)
    [drawn] = poll(served, path)["result"]["data"]
    assert served.client.get(image["url"]).content == file
    assert served.client.get(drawn["url"]).status_code == 200
    again = served.post(**LONG, seed=drawn["seed"]).json()["data"][0]
    assert again["sha256"] == drawn["sha256"]

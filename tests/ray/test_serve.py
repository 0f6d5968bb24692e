"""`sdbatch serve` as a user runs it: a Ray of its own, the embedded model, real requests.

tests/serve has the service without Ray.
"""

import base64
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import openai
import pyarrow.dataset as ds
import pytest
import yaml
from PIL import Image

import sdbatch
from tests.ray.processes import find_process, free_port, marked, ray_files
from tests.wait import wait_until
from tests.without_ray import without_ray

BIN = Path(sys.executable).parent
JOB = {
    "prompts": {"rows": [{"prompt": "a red circle"}]},
    "model": "builtin:shapes",
    "sampling": {"height": 64, "width": 64, "num_inference_steps": 6, "guidance_scale": 2.5},
    "engine": {"lanes": 16},  # so 24 images are sent to a replica at a time
    "output": {"path": "out"},
    "serve": {"timeout_s": 60},
}
# A minute or more of work for one core.
LONG = {"prompt": "a dog", "num_inference_steps": 150, "size": "768x768"}


def pixels(file):
    return np.asarray(Image.open(io.BytesIO(file)))


class Served:
    """A command that serves, from its start until it is stopped; with a Ray of its own."""

    def __init__(self, folder, command, port, ray_folder):
        self.ray_folder = ray_folder
        self.url = f"http://127.0.0.1:{port}"
        self.client = httpx.Client(base_url=self.url, timeout=120)
        self._log = (folder / "log").open("w+")
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env=marked(ray_folder),
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )
        try:
            wait_until(self._is_ready, 200)
        except BaseException:
            self.close()
            raise

    def _is_ready(self):
        assert self.process.poll() is None, self.said
        with contextlib.suppress(httpx.TransportError):
            return self.client.get("/readyz").status_code == 200
        return False

    @property
    def said(self):
        return Path(self._log.name).read_text()

    def post(self, **body):
        return self.client.post("/v1/images/generations", json={"prompt": "a dog", **body})

    def wait_for_open(self, images):
        """Wait until so many images are open."""
        line = f"sdbatch_images_open {images:.1f}"
        wait_until(lambda: line in self.client.get("/metrics").text)

    def stop(self):
        """Stop it as Ctrl-C does; return its exit code."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(timeout=100)

    def close(self):
        self.client.close()
        if self.process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.stop()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._log.close()


@contextlib.contextmanager
def serving(folder, job):
    """Serve a job with `sdbatch serve`, and yield what is Served."""
    (folder / "job.yaml").write_text(yaml.safe_dump(job))
    port = free_port()
    command = [str(BIN / "sdbatch"), "serve", "job.yaml", "--port", str(port)]
    with ray_files() as ray_folder:
        served = Served(folder, command, port, ray_folder)
        yield served
        served.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("served"), JOB) as served:
        yield served


def test_it_says_where_it_is_and_draws(served):
    wait_until(lambda: "serving" in served.said)  # it is ready a moment before it says so
    assert f"serving builtin:shapes at {served.url}/" in served.said
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        image = client.images.generate(model="builtin:shapes", prompt="a red circle").data[0]
        assert pixels(base64.b64decode(image.b64_json)).shape == (64, 64, 3)
        streamed = list(client.images.generate(prompt="a dog", stream=True, partial_images=1))
        assert len(streamed) == 2
    [log] = served.ray_folder.glob("ray/session_2*/logs/serve/replica_sdbatch_Front_*.log")
    assert '"route": "/v1/images/generations", "status": 200' in log.read_text()
    assert "red circle" not in log.read_text()


def test_a_batch_run_draws_the_same_pixels(served, tmp_path, monkeypatch):
    asked = {"prompt": "a green star", "seed": 2**40, "n": 2, "guidance_scale": 4.0}
    exact = served.post(**asked, exact=True).json()["data"]
    quick = served.post(**asked).json()["data"]
    job_file = served.client.post("/v1/images/job_file", json=asked).text
    (tmp_path / "again.yaml").write_text(job_file)
    monkeypatch.chdir(tmp_path)
    with without_ray():
        assert sdbatch.run(sdbatch.load_job("again.yaml")).exit_code == 0
    rows = ds.dataset(tmp_path / "out" / "again" / "data").to_table().to_pylist()
    assert [row["seed"] for row in rows] == [2**40, 2**40 + 1]
    drawn = [pixels(row["image"]["bytes"]) for row in rows]
    assert [image["exact"] for image in exact] == [True, True]
    for image, batch in zip(exact, drawn, strict=True):
        assert np.array_equal(pixels(base64.b64decode(image["b64_json"])), batch)
    for image, batch in zip(quick, drawn, strict=True):
        theirs = pixels(base64.b64decode(image["b64_json"])).astype(int)
        assert np.abs(theirs - batch).max() <= 1


def test_requests_at_a_time_share_the_batch(served):
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(served.post, seed=i, num_inference_steps=40) for i in range(8)]
        answers = [one.result() for one in asked]
    assert [answer.status_code for answer in answers] == [200] * 8
    assert max(answer.json()["data"][0]["lanes"] for answer in answers) >= 8


def test_a_client_that_hangs_up_leaves_the_engine_free(served):
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{served.url}/v1/images/generations", json=LONG, timeout=4)
    with served.client.stream(
        "POST", "/v1/images/generations", json={**LONG, "stream": True}
    ) as stream:
        next(line for line in stream.iter_lines() if "step" in line)
    served.wait_for_open(0)
    assert alone(served)


def alone(served):
    """Tell whether a request of LONG's size finds no other in the lanes: then it is in two."""
    answer = served.post(size=LONG["size"], num_inference_steps=2)
    return answer.json()["data"][0]["lanes"] == 2


@contextlib.contextmanager
def flood(served, jobs):
    """Keep long jobs of 10 images each in the queue; cancel them at the end."""
    body = {**LONG, "n": 10}
    names = [served.client.post("/v1/images/jobs", json=body).json()["id"] for _ in range(jobs)]
    try:
        yield
    finally:
        for name in names:
            served.client.post(f"/v1/images/jobs/{name}/cancel")
        served.wait_for_open(0)


def wait_for_metric(served, name, value):
    line = f'{name}{{key="here"}} {value:.1f}'
    wait_until(lambda: line in served.client.get("/metrics").text)


def test_a_replica_is_sent_no_more_images_than_it_can_use(served):
    with flood(served, jobs=3):
        wait_for_metric(served, "sdbatch_images_drawing", 24)
        wait_for_metric(served, "sdbatch_images_waiting", 6)


def test_images_of_a_killed_replica_are_drawn_again_with_the_same_pixels(served):
    """Of single requests, a stream and a long job; the only replica dies while it draws them."""
    body = {"num_inference_steps": 100, "exact": True}  # five of them fit into the lanes
    job = served.client.post("/v1/images/jobs", json={**body, "prompt": "a dog", "n": 2}).json()
    with ThreadPoolExecutor(2) as pool:
        held = [pool.submit(served.post, **body, seed=seed) for seed in (5, 6)]
        served.wait_for_open(4)
        streamed = {**body, "prompt": "a dog", "seed": 7, "stream": True, "partial_images": 3}
        with served.client.stream("POST", "/v1/images/generations", json=streamed) as stream:
            lines = stream.iter_lines()
            next(line for line in lines if "step" in line)  # the replica has the others too
            os.kill(find_process(served.ray_folder, ":Drawer"), signal.SIGKILL)
            events = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
        answers = [one.result() for one in held]
    assert [event.get("partial_image_index") for event in events] == [0, 1, 2, None]
    assert [answer.status_code for answer in answers] == [200, 200]
    wait_until(lambda: served.client.get(job["poll_url"]).json()["status"] == "completed")
    assert "sdbatch_images_redrawn_total 5.0" in served.client.get("/metrics").text
    images = [answer.json()["data"][0]["b64_json"] for answer in answers] + [events[-1]["b64_json"]]
    again = served.post(**body, seed=5, n=3).json()["data"]
    for image, other in zip(images, again, strict=True):
        first, second = (pixels(base64.b64decode(each)) for each in (image, other["b64_json"]))
        assert np.array_equal(first, second)


@pytest.mark.slow
def test_under_load_a_second_replica_is_started_and_sent_as_many_images(served):
    with flood(served, jobs=5):
        wait_for_metric(served, "sdbatch_images_drawing", 48)
        wait_for_metric(served, "sdbatch_images_waiting", 2)


def test_stopping_draws_what_was_taken_in(served):
    with ThreadPoolExecutor(2) as pool:
        held = [pool.submit(served.post, num_inference_steps=150, size="128x128") for _ in range(2)]
        served.wait_for_open(2)
        assert served.stop() == 0, served.said
        assert [one.result().status_code for one in held] == [200, 200]
    assert "stopping: accepted requests are still answered" in served.said
    with pytest.raises(httpx.ConnectError):
        served.client.get("/healthz")


@pytest.mark.slow
def test_ray_serves_own_command_serves_the_application_of_a_config(tmp_path):
    """As `serve run` and `serve deploy` take it, and KubeRay's RayService."""
    port = free_port()
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(JOB))
    application = {
        "name": "sdbatch",
        "route_prefix": "/",
        "import_path": "sdbatch.serve:build",
        "args": {"job": str(tmp_path / "job.yaml"), "sampling.num_inference_steps": 3},
    }
    config = {"http_options": {"host": "127.0.0.1", "port": port}, "applications": [application]}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    # by name: else the address that a killed Ray has left in a file is waited for
    command = [str(BIN / "serve"), "run", "--address", "local", "config.yaml"]
    with ray_files() as ray_folder:
        served = Served(tmp_path, command, port, ray_folder)
        try:
            assert served.post().status_code == 200
            options = served.client.get("/openapi.json").json()
            body = options["paths"]["/v1/images/jobs"]["post"]["requestBody"]
            values = body["content"]["application/json"]["schema"]["properties"]
            assert values["num_inference_steps"]["default"] == 3
        finally:
            served.close()


@pytest.mark.slow
def test_a_model_that_cannot_draw_the_job_is_refused_in_one_line(tmp_path):
    job = {**JOB, "sampling": {**JOB["sampling"], "clip_skip": 90}}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    command = [str(BIN / "sdbatch"), "serve", "job.yaml", "--port", str(free_port())]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2, done.stdout + done.stderr
    [line] = done.stderr.splitlines()
    assert "Error: sampling: the model cannot draw this: clip_skip = 90: must be below" in line

"""`serve deploy` on a Ray that was started before, with the config of cluster/rayservice.yaml.

As far as one machine can, this is what KubeRay does: `ray start` with the environment and the
labels of the file's pods, and its serveConfigV2 sent to the dashboard.
"""

import re
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import httpx
import pytest
import yaml

from tests.cluster import documents
from tests.ray.processes import free_port, kill_all, marked, ray_files
from tests.wait import wait_until

BIN = Path(sys.executable).parent
TOKEN = "a-token-of-64-digits-or-what-else-the-head-was-started-with"
KEY = "a-key-of-enough-characters-for-the-service"
HEADERS = {"Authorization": f"Bearer {KEY}"}
STEPS, OTHER_STEPS = 6, 3
JOB = {
    "prompts": {"rows": [{"prompt": "a red circle"}]},
    "model": "builtin:shapes",
    "sampling": {
        "height": 64,
        "width": 64,
        "num_inference_steps": STEPS,
        "guidance_scale": 2.5,
    },
    "engine": {"threads": 1},
    "output": {"path": "out"},
    "serve": {"timeout_s": 60, "max_replicas": 1},
}


def service() -> dict:
    """Return the resource of rayservice.yaml."""
    return documents("rayservice.yaml")[-1]


class Cluster:
    """A Ray of one node, and Serve on it, through the commands and the REST API of Ray."""

    def __init__(self, ray_folder: Path, folder: Path) -> None:
        self.ray_folder, self.folder = ray_folder, folder
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        dashboard = free_port()
        self.dashboard = f"http://127.0.0.1:{dashboard}"
        spec = service()["spec"]["rayClusterConfig"]
        front = next(each for each in spec["workerGroupSpecs"] if each["groupName"] == "front")
        [container] = front["template"]["spec"]["containers"]
        self.environment = {
            **marked(ray_folder),
            **{each["name"]: each["value"] for each in container["env"] if "RAY" in each["name"]},
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": TOKEN,
            "SDBATCH_API_KEYS": KEY,
        }
        ports = {
            "port": 0,
            "dashboard-port": dashboard,
            "dashboard-agent-listen-port": 0,
            "ray-client-server-port": free_port(),
        }
        labels = ",".join(f"{name}={value}" for name, value in front["labels"].items())
        options = [f"--{name}={value}" for name, value in ports.items()]
        self.run("ray", "start", "--head", "--num-cpus=9", f"--labels={labels}", *options)

    def run(self, *command: str) -> str:
        """Run a command; return what it prints."""
        done = subprocess.run(
            [str(BIN / command[0]), *command[1:]],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def api(self, method: str, **options) -> dict:
        """Call the REST API of the dashboard, as KubeRay does."""
        url = f"{self.dashboard}/api/serve/applications/"
        headers = {"Authorization": f"Bearer {TOKEN}"}
        answer = httpx.request(method, url, headers=headers, timeout=100, **options)
        assert answer.is_success, answer.text
        return answer.json() if method == "GET" else {}

    def config(self, **args) -> dict:
        """Return the config of rayservice.yaml with the port, the job file and `args` replaced.

        A second application is added, which no test updates.
        """
        config = yaml.safe_load(service()["spec"]["serveConfigV2"])
        [application] = config["applications"]
        assert application["args"] == {"job": "/jobs/job.yaml"}
        job = str(self.folder / "job.yaml")
        second = {
            **application,
            "name": "second",
            "route_prefix": "/two",
            "args": {"job": job, "sampling.num_inference_steps": OTHER_STEPS},
        }
        application["args"] = {"job": job, **args}
        http_options = {"host": "127.0.0.1", "port": self.port}
        return {"http_options": http_options, "applications": [application, second]}

    def deploy(self, config: dict) -> None:
        """Deploy as a user does."""
        (self.folder / "serve.yaml").write_text(yaml.safe_dump(config))
        self.run("serve", "deploy", "serve.yaml", "--address", self.dashboard)

    def application(self) -> dict:
        return self.api("GET")["applications"]["sdbatch"]

    def replicas(self) -> dict[str, set[str]]:
        """Return the ids of the running replicas by deployment; none while others exist."""
        found = {}
        for name, deployment in self.application()["deployments"].items():
            if {each["state"] for each in deployment["replicas"]} == {"RUNNING"}:
                found[name] = {each["actor_id"] for each in deployment["replicas"]}
        return found

    def wait_until_running(self, *, without: dict[str, set[str]] | None = None) -> None:
        """Wait until all applications run, and no replica of `without` is left."""
        old = without or {}

        def all_run() -> bool:
            statuses = {each["status"] for each in self.api("GET")["applications"].values()}
            assert "DEPLOY_FAILED" not in statuses, self.application()
            if statuses != {"RUNNING"}:
                return False
            found = self.replicas()
            return len(found) == 2 and not any(found[name] & old.get(name, set()) for name in found)

        wait_until(all_run, 200)

    def default_steps(self, prefix: str = "") -> int:
        """Return the steps of a request that names none, as the OpenAPI document has them."""
        document = httpx.get(f"{self.url}{prefix}/openapi.json", timeout=60).json()
        body = document["paths"]["/v1/images/generations"]["post"]["requestBody"]
        properties = body["content"]["application/json"]["schema"]["properties"]
        return properties["num_inference_steps"]["default"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deployed")
    (folder / "job.yaml").write_text(yaml.safe_dump(JOB))
    with ray_files() as ray_folder:
        try:
            cluster = Cluster(ray_folder, folder)
            cluster.api("PUT", json=cluster.config())
            cluster.wait_until_running()
            yield cluster
        finally:
            kill_all(ray_folder)


@pytest.fixture
def client():
    with httpx.Client(headers=HEADERS, timeout=120) as client:
        yield client


class Load:
    """Clients that send one request after the other, until the end of the block."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.answers: Counter[tuple[str, object]] = Counter()
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._send, args=each)
            for each in (
                ("single", "", {}),
                ("several", "", {"n": 3, "response_format": "url"}),
                ("stream", "", {"stream": True, "partial_images": 1}),
                ("second", "/two", {}),
            )
        ]

    def _send(self, name: str, prefix: str, more: dict) -> None:
        url = f"{self.url}{prefix}/v1/images/generations"
        with httpx.Client(headers=HEADERS, timeout=120) as client:
            while not self._stop.is_set():
                try:
                    answer = client.post(url, json={"prompt": "a dog", **more})
                except httpx.TransportError as error:
                    self.answers[name, repr(error)] += 1
                    continue
                complete = name != "stream" or "image_generation.completed" in answer.text
                self.answers[name, answer.status_code if complete else answer.text[-200:]] += 1

    def wait_for_more(self) -> None:
        """Wait until each client has got an answer that it asked for after this call."""
        before = self._by_client()
        wait_until(lambda: all(self._by_client()[name] > before[name] + 1 for name in before), 120)

    def _by_client(self) -> Counter[str]:
        counts = Counter({"single": 0, "several": 0, "stream": 0, "second": 0})
        for (name, _), number in list(self.answers.items()):
            counts[name] += number
        return counts

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


@pytest.mark.parametrize(("prefix", "steps"), [("", STEPS), ("/two", OTHER_STEPS)])
def test_an_application_works_under_its_prefix(cluster, client, prefix, steps):
    base = cluster.url + prefix
    assert cluster.default_steps(prefix) == steps
    page = client.get(f"{base}/")
    assert page.headers["content-type"].startswith("text/html")
    assert not re.findall(r"""(?:fetch\(|href=|src=)["']/""", page.text)  # paths below the page's
    for path in re.findall(r"(?:href|src)=\"(/[^\"]+)\"", client.get(f"{base}/docs").text):
        assert client.get(cluster.url + path).status_code == 200
    for probe in ("healthz", "readyz", "metrics", "v1/models"):
        assert client.get(f"{base}/{probe}").status_code == 200
    body = {"prompt": "a dog", "response_format": "url"}
    image = client.post(f"{base}/v1/images/generations", json=body).json()["data"][0]
    assert image["url"].startswith(f"{base}/v1/images/files/")
    assert client.get(image["url"]).headers["content-type"] == "image/png"
    accepted = client.post(f"{base}/v1/images/jobs", json=body)
    poll_url = accepted.json()["poll_url"]
    assert poll_url == accepted.headers["location"]
    assert poll_url.startswith(f"{base}/v1/images/jobs/")
    wait_until(lambda: client.get(poll_url).json()["status"] == "completed")


def test_the_keys_and_the_counts_of_an_application_are_its_own_under_a_prefix(cluster, client):
    assert httpx.get(f"{cluster.url}/two/v1/models").status_code == 401
    for public in ("/two", "/two/", "/two/healthz"):
        assert httpx.get(cluster.url + public, follow_redirects=True).status_code == 200
    client.get(f"{cluster.url}/two/sdapi/v1/samplers")
    line = 'route="/sdapi/v1/samplers",status="200"} 1.0'
    assert line in client.get(f"{cluster.url}/two/metrics").text
    assert line not in client.get(f"{cluster.url}/metrics").text


@pytest.mark.parametrize(
    ("surge", "steps"), [(True, 4), pytest.param(False, 5, marks=pytest.mark.slow)]
)
def test_an_update_of_the_job_fails_no_request(cluster, client, surge, steps):
    job = {**JOB, "sampling": {**JOB["sampling"], "num_inference_steps": 99}}
    file = cluster.folder / f"job-{steps}.yaml"
    file.write_text(yaml.safe_dump(job))
    args = {
        "job": str(file),
        "sampling.num_inference_steps": steps,
        "serve.keys": None,
        "serve.limits": {"images": 3},
    }
    config = cluster.config(**args)
    if not surge:  # old replicas stop before new ones start
        del config["applications"][0]["deployments"]
    old = cluster.replicas()
    second = cluster.api("GET")["applications"]["second"]["deployments"]
    with Load(cluster.url) as load:
        load.wait_for_more()
        cluster.deploy(config)
        cluster.wait_until_running(without=old)
        load.wait_for_more()
    assert {answer for _, answer in load.answers} == {200}, load.answers
    assert cluster.default_steps() == steps
    url = f"{cluster.url}/v1/images/generations"
    assert client.post(url, json={"prompt": "a dog", "n": 4}).status_code == 400
    now = cluster.api("GET")["applications"]["second"]["deployments"]
    for name, deployment in second.items():  # it was not touched
        assert [each["actor_id"] for each in now[name]["replicas"]] == [
            each["actor_id"] for each in deployment["replicas"]
        ]


@pytest.mark.slow
def test_long_jobs_and_images_by_url_survive_an_update_with_a_store(cluster, client):
    args = {"serve.keep": str(cluster.folder / "keep")}
    old = cluster.replicas()
    cluster.deploy(cluster.config(**args))
    cluster.wait_until_running(without=old)
    images = f"{cluster.url}/v1/images"
    body = {"prompt": "a dog", "response_format": "url"}
    url = client.post(f"{images}/generations", json=body).json()["data"][0]["url"]
    file = client.get(url).content
    long = {"prompt": "a dog", "num_inference_steps": 150, "size": "256x256"}
    jobs = [client.post(f"{images}/jobs", json={**long, "seed": seed}).json() for seed in range(3)]
    old = cluster.replicas()
    cluster.deploy(cluster.config(**args, **{"sampling.num_inference_steps": 7}))
    cluster.wait_until_running(without=old)
    assert client.get(url).content == file
    for job in jobs:
        wait_until(lambda job=job: client.get(job["poll_url"]).json()["status"] == "completed", 200)


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ({"sampling.clip_skip": 90}, "the model cannot draw this: clip_skip = 90: must be below 2"),
        pytest.param(
            {"job": "nowhere.yaml"},
            "nowhere.yaml = [Errno 2] No such file or directory",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"sampling.stepz": 5},
            "sampling.stepz: unknown key. Known: negative_prompt",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_an_update_that_cannot_work_says_why_and_leaves_the_service_as_it_is(
    cluster, client, args, text
):
    steps = cluster.default_steps()

    def last_lines() -> list[str]:
        """Return the last lines of the messages about the application."""
        shown = yaml.safe_load(cluster.run("serve", "status", "--address", cluster.dashboard))
        application = shown["applications"]["sdbatch"]
        parts = [application, *application["deployments"].values()]
        texts = [part["message"].strip() for part in parts]
        return [text.splitlines()[-1] for text in texts if text]

    with Load(cluster.url) as load:
        cluster.deploy(cluster.config(**args))
        wait_until(lambda: cluster.application()["status"] == "DEPLOY_FAILED", 100)
        load.wait_for_more()
    assert any(line.startswith("sdbatch.errors.") and text in line for line in last_lines())
    assert {answer for _, answer in load.answers} == {200}, load.answers
    assert cluster.default_steps() == steps

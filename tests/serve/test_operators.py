"""What operators need: a public URL, CORS, a key for metrics, probes, a log that tells requests."""

import json
import logging
import queue
from logging.handlers import QueueHandler

import pytest

from sdbatch.errors import JobError
from sdbatch.job import Serve
from sdbatch.serve import access
from sdbatch.serve.log import log
from tests.serve.conftest import job_of, metric
from tests.serve.listening import SECONDS

ALICE, MONITOR = "alice-" + "0" * 16, "monitor-" + "1" * 16
PAGE = "https://app.example.org"


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture
def keys(write):
    """Write a key file with a key that draws and one that only reads metrics."""
    return write("keys.yaml", f"alice: {ALICE}\nmonitor: {{key: {MONITOR}, only: metrics}}\n")


@pytest.fixture
def log_records():
    """Return the queue of what the service logs from now on."""
    records = queue.SimpleQueue()
    handler = QueueHandler(records)
    log.addHandler(handler)
    level = log.level
    log.setLevel(logging.INFO)
    yield records
    log.setLevel(level)
    log.removeHandler(handler)


def next_line(records):
    return json.loads(records.get(timeout=SECONDS).message)


@pytest.mark.parametrize("url", ["https://images.example.org/sd", "https://images.example.org/sd/"])
def test_urls_in_responses_begin_with_the_public_url(serving, url):
    server = serving(serve={"public_url": url})
    image = server.post(prompt="a", response_format="url").json()["data"][0]
    assert image["url"].startswith("https://images.example.org/sd/v1/images/files/")
    job = server.post("/v1/images/jobs", prompt="a")
    assert job.json()["poll_url"].startswith("https://images.example.org/sd/v1/images/jobs/")
    assert job.headers["location"] == job.json()["poll_url"]
    document = server.client.get("/openapi.json").json()
    assert document["servers"] == [{"url": "https://images.example.org/sd"}]


@pytest.mark.parametrize("url", ["images.example.org", "ftp://x", "https://", "https://x/?a=1", ""])
def test_a_public_url_that_clients_cannot_use_is_refused(url):
    with pytest.raises(JobError, match=r"serve\.public_url = .*must be a URL such as https://"):
        job_of(serve={"public_url": url})


def test_a_page_of_a_listed_origin_may_use_the_service(serving, keys):
    server = serving(serve={"keys": keys, "cors_origins": [PAGE]})
    preflight = server.client.options(
        "/v1/images/generations",
        headers={
            "Origin": PAGE,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization, content-type, x-stainless-lang",
        },
    )
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == PAGE
    assert "POST" in preflight.headers["access-control-allow-methods"]
    assert "authorization" in preflight.headers["access-control-allow-headers"].lower()
    drawn = server.client.post(
        "/v1/images/generations", json={"prompt": "a"}, headers={"Origin": PAGE, **bearer(ALICE)}
    )
    assert drawn.status_code == 200
    assert drawn.headers["access-control-allow-origin"] == PAGE
    exposed = drawn.headers["access-control-expose-headers"]
    assert "Retry-After" in exposed
    assert "X-Request-ID" in exposed
    rejected = server.client.get("/v1/models", headers={"Origin": PAGE})
    assert rejected.status_code == 401  # and the page can read why
    assert rejected.headers["access-control-allow-origin"] == PAGE


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "https://app.example.org.evil.example", "null", "*"]
)
def test_pages_of_other_origins_get_no_permission(serving, keys, origin):
    server = serving(serve={"keys": keys, "cors_origins": [PAGE]})
    headers = {"Origin": origin, **bearer(ALICE)}
    answer = server.client.get("/v1/models", headers=headers)
    assert "access-control-allow-origin" not in answer.headers
    assert answer.headers["vary"] == "Origin"  # a cache must not give it to the listed page
    asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    preflight = server.client.options("/v1/images/generations", headers=asked)
    assert preflight.status_code in (401, 405)
    assert "access-control-allow-origin" not in preflight.headers


def test_without_keys_a_listed_origin_is_answered_on_this_machine(serving):
    server = serving(serve={"cors_origins": ["http://localhost:3000"]})
    answer = server.client.get("/v1/models", headers={"Origin": "http://localhost:3000"})
    assert answer.status_code == 200
    other = server.client.get("/v1/models", headers={"Origin": "http://localhost:4000"})
    assert other.status_code == 403


@pytest.mark.parametrize(
    "origin",
    ["*", "https://*.example.org", "app.example.org", "https://x/", "https://X.org", "null"],
)
def test_an_origin_that_is_not_exact_is_refused(origin):
    with pytest.raises(JobError, match=r"serve\.cors_origins.*must be one origin, such as https:"):
        job_of(serve={"cors_origins": [origin]})


def test_a_metrics_key_reads_metrics_alone_and_no_other_key_does(serving, keys):
    client = serving(serve={"keys": keys}).client
    assert client.get("/metrics", headers=bearer(MONITOR)).status_code == 200
    body = {"prompt": "a"}
    for method, path in (("GET", "/v1/models"), ("POST", "/v1/images/generations")):
        answer = client.request(method, path, json=body, headers=bearer(MONITOR))
        assert answer.status_code == 403
        assert answer.json()["error"]["code"] == "key_not_allowed"
        assert "may read /metrics and nothing else" in answer.json()["error"]["message"]
    rejected = client.get("/metrics", headers=bearer(ALICE))
    assert rejected.status_code == 403
    assert "Use one with `only: metrics`" in rejected.json()["error"]["message"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"m: {{key: {MONITOR}, only: metrics}}", "must hold a key that may draw"),
        (f"m: {{key: {MONITOR}, only: images}}", "m.only cannot be used"),
    ],
)
def test_an_invalid_metrics_key_is_named(write, text, words):
    with pytest.raises(JobError, match=r"keys\.yaml") as caught:
        access.read_keys(Serve(keys=write("keys.yaml", text)))
    assert words in str(caught.value)
    assert MONITOR not in str(caught.value)


def test_metrics_count_images_and_seconds_by_the_names_of_keys(serving, keys):
    server = serving(serve={"keys": keys, "queue": 2})
    server.client.headers.update(bearer(ALICE))
    assert server.post(prompt="a", n=2).status_code == 200
    job = server.post("/v1/images/jobs", prompt="a").json()
    server.wait_for_pending(0)
    assert server.client.get(job["poll_url"]).status_code == 200
    server.client.headers.update(bearer(MONITOR))
    assert metric(server, 'sdbatch_key_images_total{key="alice",outcome="drawn"}') == 3
    assert metric(server, 'sdbatch_key_image_seconds_total{key="alice"}') > 0
    assert metric(server, 'sdbatch_images_total{outcome="drawn"}') == 3


@pytest.mark.parametrize("path", ["/", "/healthz", "/readyz"])
def test_probes_may_ask_for_headers_alone(server, path):
    answer = server.client.head(path)
    assert answer.status_code == 200
    assert answer.content == b""
    assert answer.headers["content-type"] == server.client.get(path).headers["content-type"]


def test_a_refusal_is_logged_with_its_address_and_its_id(serving, keys, log_records):
    server = serving(serve={"keys": keys})
    sent = {"X-Request-ID": "mine-1", **bearer("x" * 20)}
    answer = server.client.get("/v1/models", headers=sent)
    assert answer.headers.get_list("x-request-id") == ["mine-1"]
    line = next_line(log_records)
    assert line["client"] == "127.0.0.1"
    assert line["request_id"] == "mine-1"
    assert line["status"] == 401
    answer = server.client.get("/v1/models", headers=bearer(ALICE))
    line = next_line(log_records)
    assert line["request_id"] == answer.headers["x-request-id"]
    assert "client" not in line  # an answered request is its key's


def test_a_refusal_on_a_public_path_is_logged_and_a_probe_is_not(server, log_records):
    server.client.get("/healthz")
    server.client.post("/", content=b"x" * 300_000)
    line = next_line(log_records)
    assert (line["status"], line["client"]) == (413, "127.0.0.1")


@pytest.mark.parametrize("sent", ["a" * 65, "with space", "<script>"])
def test_a_request_id_of_another_form_is_replaced(server, sent):
    shown = server.client.get("/", headers={"X-Request-ID": sent}).headers["x-request-id"]
    assert shown != sent
    assert len(shown) == 32

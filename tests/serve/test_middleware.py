"""What every request passes: body sizes, headers, unknown paths, internal errors."""

import logging
import queue
from logging.handlers import QueueHandler

import pytest

from sdbatch.serve.log import log
from sdbatch.serve.service import Service
from tests.serve.conftest import SECONDS


@pytest.mark.parametrize("declared", [True, False], ids=["content-length", "chunked"])
def test_a_body_that_is_too_large_is_rejected(server, declared):
    text = b'{"prompt": "' + b"x" * 300_000 + b'"}'
    content = text if declared else iter([text[:200_000], text[200_000:]])
    answer = server.client.post(
        "/v1/images/generations", content=content, headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "request_too_large"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("GET", "/v1/images/generations", 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/v1/audio/speech", 404),
        ("GET", "/static/../../pyproject.toml", 404),
        ("GET", "/static/%2e%2e/%2e%2e/core.py", 404),
    ],
)
def test_an_unknown_path_is_an_error_in_openais_shape(server, method, path, status):
    answer = server.client.request(method, path)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_every_response_forbids_content_sniffing_and_frames(server):
    for path in ("/", "/v1/models", "/nowhere"):
        headers = server.client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert "frame-ancestors 'none'" in headers["content-security-policy"]


@pytest.fixture
def log_records():
    """Return the queue of what the service logs from now on."""
    records = queue.SimpleQueue()
    handler = QueueHandler(records)
    log.addHandler(handler)
    yield records
    log.removeHandler(handler)


def test_an_internal_error_is_logged_and_not_shown(server, monkeypatch, log_records):
    def fail(self, image_request, key):
        raise ZeroDivisionError("a secret of the service")

    monkeypatch.setattr(Service, "reserve", fail)
    answer = server.post(prompt="a dog")
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert answer.json()["error"]["message"] == (
        "The service failed because of an internal error. Its log has the details."
    )
    record = log_records.get(timeout=SECONDS)  # it is logged after the response
    assert record.levelno == logging.ERROR
    assert "a secret of the service" in record.message


def test_metrics_count_requests_by_route_and_never_by_name(server):
    server.client.get("/v1/images/files/some-name.png")
    server.client.get("/no/such/path")
    text = server.client.get("/metrics").text
    assert 'route="/v1/images/files/{name}",status="404"' in text
    assert 'route="other",status="404"' in text
    assert "some-name" not in text
    assert "sdbatch_image_seconds_bucket" in text


def test_the_openapi_document_has_every_route_and_how_to_send_a_key(server):
    api = server.client.get("/openapi.json").json()
    assert {
        "/v1/images/generations",
        "/v1/images/jobs",
        "/v1/images/jobs/{name}",
        "/v1/images/jobs/{name}/cancel",
        "/v1/models",
        "/v1/images/edits",
        "/v1/images/variations",
        "/sdapi/v1/txt2img",
        "/sdapi/v1/img2img",
    } <= api["paths"].keys()
    assert api["components"]["securitySchemes"]["HTTPBearer"]["scheme"] == "bearer"
    body = api["paths"]["/v1/images/generations"]["post"]["requestBody"]
    values = body["content"]["application/json"]["schema"]["properties"]
    assert values["num_inference_steps"]["default"] == 4  # the job's own
    sampler, null = values["sampler"]["anyOf"]
    assert "dpmpp_2m_karras" in sampler["enum"]
    assert null == {"type": "null"}


def test_the_page_of_the_documents_loads_nothing_from_other_machines(server):
    page = server.client.get("/docs").text
    assert "http://" not in page.replace(server.url, "")
    assert "https://" not in page
    for path in ("/static/swagger-ui-bundle.js", "/static/swagger-ui.css"):
        assert path in page
        assert server.client.get(path).status_code == 200

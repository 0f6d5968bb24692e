"""What runs in Ray's proxy, in front of applications that answer as Ray does; tests/ray has Ray."""

import asyncio
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from ray.serve._private.http_util import RequestIdMiddleware, validate_http_proxy_callback_return
from uvicorn.protocols.http import auto

from sdbatch.serve import proxy
from sdbatch.serve.connections import Connection
from sdbatch.serve.exchange import ACCEPTED, ANSWERED, OURS
from sdbatch.serve.proxy import Proxy
from tests.serve.conftest import PausedEngine
from tests.serve.listening import SECONDS, Listening

DRAW = "/v1/images/generations"


@pytest.fixture
def client(request):
    """Start a proxy in front of an application; return a client of it."""

    def start(application):
        listening = Listening(Proxy(application), http=Connection)
        request.addfinalizer(listening.close)
        client = httpx.Client(base_url=listening.url, timeout=SECONDS)
        request.addfinalizer(client.close)
        return client

    return start


def answering(status, text, *headers, more=False):
    """Return an application with one answer, which `more` leaves incomplete."""

    async def application(scope, receive, send):
        await send({"type": "http.response.start", "status": status, "headers": list(headers)})
        await send({"type": "http.response.body", "body": text, "more_body": more})

    return application


async def answer_nothing(scope, receive, send):
    """Return as Ray's proxy does when the Front dies with a request."""


async def wait_forever(scope, receive, send):
    while (await receive())["type"] != "http.disconnect":
        pass


def check_is_front_lost(answer):
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "5"
    error = answer.json()["error"]
    assert error["code"] == "front_lost"
    assert error["type"] == "server_error"
    assert "Send the request again." in error["message"]


def test_a_request_whose_front_dies_is_a_retryable_error(client):
    check_is_front_lost(client(answer_nothing).post(DRAW, json={"prompt": "a"}))


@pytest.mark.parametrize(
    ("path", "status", "text", "shown_status", "code"),
    [
        ("/two", 404, b"Path '/two' not found. Ping http://.../-/routes", 404, "not_found"),
        (DRAW, 503, b"Deployment 'Front' is unavailable", 503, "front_lost"),
        (DRAW, 500, b"Internal Server Error", 503, "front_lost"),
        (DRAW, 408, b"Request 1 timed out after 5s.", 504, "timeout"),
        (DRAW, 429, b"Request dropped", 429, "invalid"),
        ("/-/healthz", 503, b"This node is being drained.", 503, "stopping"),
        ("/-/routes", 503, b"Route table is not populated yet.", 503, "stopping"),
    ],
)
def test_errors_of_rays_own_have_the_shape_of_the_api(
    client, path, status, text, shown_status, code
):
    answer = client(answering(status, text, (b"content-type", b"text/plain"))).get(path)
    assert answer.status_code == shown_status
    assert answer.json()["error"]["code"] == code
    assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
    assert text.decode() not in answer.text


def test_an_error_of_rays_own_that_ends_early_is_uniform_too(client):
    check_is_front_lost(client(answering(503, b"Depl", more=True)).get("/"))


def test_answers_of_the_front_and_good_ones_of_ray_pass_as_they_are(client):
    theirs = client(answering(404, b"ours", (OURS, ANSWERED), (b"x-other", b"1"))).get("/")
    assert (theirs.status_code, theirs.text, theirs.headers["x-other"]) == (404, "ours", "1")
    assert OURS.decode() not in theirs.headers
    assert client(answering(200, b"success")).get("/-/healthz").text == "success"


def test_an_error_inside_ray_is_an_internal_error_without_its_details(client):
    async def fail(scope, receive, send):
        raise ZeroDivisionError("a secret of Ray")

    answer = client(fail).get("/")
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal"
    assert "secret" not in answer.text


def test_a_stream_whose_front_dies_ends_with_the_error_as_an_event(client):
    events = (b"content-type", b"text/event-stream; charset=utf-8")
    stream = answering(200, b": waits\n\n", events, (OURS, ANSWERED), more=True)
    begun, event, data = filter(None, client(stream).post(DRAW, json={}).text.splitlines())
    assert (begun, event) == (": waits", "event: error")
    assert json.loads(data.removeprefix("data: "))["error"]["code"] == "front_lost"


def test_another_response_whose_front_dies_is_cut_and_looks_complete_to_nobody(client):
    image = answering(200, b"half of it", (b"content-length", b"99"), (OURS, ANSWERED), more=True)
    with pytest.raises(httpx.RemoteProtocolError):
        client(image).get("/v1/images/files/x.png")


def test_a_request_that_no_front_accepts_ends_and_an_accepted_one_may_wait(client, monkeypatch):
    monkeypatch.setattr(proxy, "FRONT_SECONDS", 0.2)
    check_is_front_lost(client(wait_forever).post(DRAW, json={"prompt": "a"}))

    async def accept_and_answer_late(scope, receive, send):
        assert ACCEPTED in scope["extensions"]
        await send({"type": ACCEPTED})
        await asyncio.sleep(0.6)
        await answering(200, b"drawn")(scope, receive, send)

    assert client(accept_and_answer_late).post(DRAW, json={"prompt": "a"}).text == "drawn"


def test_the_service_accepts_a_request_before_it_draws(serving, client, monkeypatch):
    monkeypatch.setattr(proxy, "FRONT_SECONDS", 0.3)
    engine = PausedEngine()
    server = serving(engine)
    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(client(server.application).post, DRAW, json={"prompt": "a"})
        engine.wait_for(waiting=1)
        with pytest.raises(TimeoutError):
            held.result(0.6)  # no answer yet: neither an image nor an error
        engine.draw_all()
        assert held.result(SECONDS).status_code == 200


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_healthz_is_answered_by_the_proxy_itself(client, method):
    answer = client(answer_nothing).request(method, "/healthz")
    assert answer.status_code == 200
    assert answer.text == ("" if method == "HEAD" else '{"status":"ok"}')


@pytest.mark.parametrize("path", ["/readyz", "/two/readyz", "/two/healthz"])
def test_a_probe_says_soon_that_there_is_no_front(client, monkeypatch, path):
    monkeypatch.setattr(proxy, "PROBE_SECONDS", 0.1)
    check_is_front_lost(client(wait_forever).get(path))


async def echo(scope, receive, send):
    """Answer with the headers that arrive, as a Front; the proxy may not show OURS."""
    headers = {name.decode(): value.decode() for name, value in scope["headers"]}
    body = json.dumps(headers).encode()
    await answering(200, body, (OURS, ANSWERED))(scope, receive, send)


@pytest.mark.parametrize("sent", ["abc-1.2_X", "a" * 64])
def test_a_request_keeps_the_id_that_its_client_gave_it(client, sent):
    answer = client(RequestIdMiddleware(echo)).get("/", headers={"X-Request-ID": sent})
    assert answer.json()["x-request-id"] == sent
    assert answer.headers.get_list("x-request-id") == [sent]


@pytest.mark.parametrize("sent", ["a" * 65, "with space", "é", "", "a,b", "<script>"])
def test_an_id_of_another_form_is_replaced(client, sent):
    headers = {"X-Request-ID": sent.encode()}
    answer = client(RequestIdMiddleware(echo)).get("/", headers=headers)
    [shown] = answer.headers.get_list("x-request-id")
    assert shown == answer.json()["x-request-id"]
    assert shown != sent
    assert len(shown) == 32


@pytest.mark.parametrize(
    "name",
    [
        "X-Request-Timeout-Seconds",
        "X-Request-Disconnect-Disabled",
        "serve_multiplexed_model_id",
        "Serve-Multiplexed-Model-Id",
        "X-Session-Id",
    ],
)
def test_headers_that_steer_ray_do_not_reach_it(client, name):
    headers = client(echo).get("/", headers={name: "?1", "X-Mine": "1"}).json()
    assert name.lower() not in headers
    assert headers["x-mine"] == "1"


def test_rays_proxy_takes_the_middleware_and_its_connections(monkeypatch):
    monkeypatch.setattr(auto, "AutoHTTPProtocol", auto.AutoHTTPProtocol)  # is set back at the end
    [middleware] = validate_http_proxy_callback_return(proxy.middlewares())
    assert middleware.cls is Proxy
    assert auto.AutoHTTPProtocol is Connection


def test_the_process_of_the_proxy_loads_neither_torch_nor_a_model():
    probe = "import sys, sdbatch.serve.proxy; print({'torch', 'diffusers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr

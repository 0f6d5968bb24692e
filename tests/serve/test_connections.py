"""Time limits of connections: headers, silence, and responses that nobody reads."""

import asyncio
import json
import threading

import httpx
import pytest

from sdbatch.serve import connections
from sdbatch.serve.connections import Connection
from tests.serve.listening import SECONDS, Listening, read_all

LARGE = b"x" * 2**25  # more than the system's buffers of a connection hold


@pytest.fixture
def listening(request):
    """Start an application whose connections have time limits."""

    def start(application):
        started = Listening(application, http=Connection)
        request.addfinalizer(started.close)
        return started

    return start


async def answer_ok(scope, receive, send):
    await send(
        {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]}
    )
    await send({"type": "http.response.body", "body": b"ok"})


def test_headers_that_do_not_end_are_answered_with_408(listening, monkeypatch):
    monkeypatch.setattr(connections, "HEADERS_SECONDS", 0.2)
    response = read_all(listening(answer_ok).connect(b"GET / HTTP/1.1\r\nX-Slow: "))
    assert response.startswith(b"HTTP/1.1 408 ")
    error = json.loads(response.partition(b"\r\n\r\n")[2])["error"]
    assert error["code"] == "request_timeout"
    assert "The headers took longer than 0.2 s" in error["message"]


@pytest.mark.parametrize("before", [b"", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"], ids=["new", "used"])
def test_a_connection_that_begins_no_request_is_closed(listening, monkeypatch, before):
    monkeypatch.setattr(connections, "HEADERS_SECONDS", 0.2)
    connection = listening(answer_ok).connect(before)
    received = connection.recv(65536) if before else b""
    connection.sendall(b"\r\n")  # ends uvicorn's own limit
    assert (received + read_all(connection)).count(b"HTTP/1.1") == (1 if before else 0)


def test_the_next_request_may_begin_while_a_response_is_awaited(listening, monkeypatch):
    monkeypatch.setattr(connections, "HEADERS_SECONDS", 0.1)

    async def answer_late(scope, receive, send):
        await asyncio.sleep(0.5)
        await answer_ok(scope, receive, send)

    request = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
    response = read_all(listening(answer_late).connect(request + b"GET / HT"))
    first, _, second = response.partition(b"ok")
    assert first.startswith(b"HTTP/1.1 200 ")
    assert second.startswith(b"HTTP/1.1 408 ")


def test_headers_of_any_size_are_cut_off(listening):
    large = b"GET / HTTP/1.1\r\nHost: x\r\nX-Large: " + b"a" * 100_000
    response = read_all(listening(answer_ok).connect(large))
    assert response.startswith(b"HTTP/1.1 431 ")
    assert b"headers_too_large" in response


def test_many_small_requests_on_one_connection_are_no_large_headers(listening):
    started = listening(answer_ok)
    with httpx.Client(base_url=started.url) as client:
        for _ in range(5):
            assert client.get("/", headers={"X-Part": "a" * 20_000}).text == "ok"


def test_requests_on_one_connection_have_all_their_time(listening, monkeypatch):
    monkeypatch.setattr(connections, "HEADERS_SECONDS", 0.3)
    started = listening(answer_ok)
    with httpx.Client(base_url=started.url) as client:
        for _ in range(3):
            assert client.get("/").text == "ok"
            threading.Event().wait(0.2)  # together longer than the limit


def test_a_client_that_does_not_read_its_response_is_disconnected(listening, monkeypatch):
    monkeypatch.setattr(connections, "RESPONSE_SECONDS", 0.2)
    monkeypatch.setattr(connections, "MIN_BYTES_PER_SECOND", 2**40)
    disconnected = threading.Event()

    async def answer_much(scope, receive, send):
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(2):
            await send({"type": "http.response.body", "body": LARGE, "more_body": True})
        if (await receive())["type"] == "http.disconnect":
            disconnected.set()

    with listening(answer_much).connect(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"):
        assert disconnected.wait(SECONDS)


def test_a_large_response_that_is_read_arrives_whole(listening, monkeypatch):
    async def answer_much(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for more in (True, False):
            await send({"type": "http.response.body", "body": LARGE, "more_body": more})

    assert httpx.get(listening(answer_much).url, timeout=SECONDS).content == 2 * LARGE


def test_what_is_no_http_is_an_error_in_openais_shape(listening):
    response = read_all(listening(answer_ok).connect(b"\x16\x03\x01 no HTTP\r\n\r\n"))
    assert response.startswith(b"HTTP/1.1 400 ")
    error = json.loads(response.partition(b"\r\n\r\n")[2])["error"]
    assert error["message"] == "The request is no valid HTTP."

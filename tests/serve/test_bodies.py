"""Bodies that arrive slowly: in front of the application, and in the proxy in front of it."""

import json
import select
import socket

import httpx
import pytest

from sdbatch.serve import bodies
from sdbatch.serve.bodies import Bodies
from sdbatch.serve.connections import Connection
from sdbatch.serve.errors import ApiError
from sdbatch.serve.proxy import Proxy
from tests.serve.listening import SECONDS, Listening, read_all

ALICE, BOB = "alice-" + "0" * 16, "bob-" + "1" * 16
BODY = json.dumps({"prompt": "a dog"}).encode()
DRAW = "/v1/images/generations"


def begin(key=None, headers="", body=BODY):
    """Return the headers of a request and the first byte of its body."""
    sent_key = f"Authorization: Bearer {key}\r\n" if key else ""
    return (
        f"POST {DRAW} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n{sent_key}"
        f"{headers}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode() + body[:1]


def finish(connection, body=BODY):
    """Send the rest of a body; return the response's status."""
    connection.sendall(body[1:])
    return status_of(read_all(connection))


def status_of(response):
    return int(response.split(b" ", 2)[1])


def error_of(response):
    return json.loads(response.partition(b"\r\n\r\n")[2])["error"]


def is_answered(connection, seconds):
    return bool(select.select([connection], [], [], seconds)[0])


def first_answered(connections):
    """Wait until one of the connections has an answer; return its status and error."""
    [first, *_] = select.select(connections, [], [], SECONDS)[0]
    connections.remove(first)
    response = read_all(first)
    return status_of(response), error_of(response)


@pytest.fixture
def quick(monkeypatch):
    """Count a body that has not arrived as slow soon."""
    monkeypatch.setattr(bodies, "QUICK_SECONDS", 0.1)


@pytest.fixture
def serve_both(serving, request):
    """Start a service with slow bodies in front of its application, or of a proxy before it."""

    def start(where, **sections):
        server = serving(**sections)
        if where == "application":
            return server.listening
        listening = Listening(Proxy(server.application), http=Connection)
        request.addfinalizer(listening.close)
        return listening

    return start


both = pytest.mark.parametrize("where", ["application", "proxy"])


@both
def test_a_body_that_does_not_arrive_in_time_is_answered_with_408(
    serve_both, quick, monkeypatch, where
):
    monkeypatch.setattr(bodies, "BODY_SECONDS", 0.2)
    response = read_all(serve_both(where).connect(begin()))
    assert status_of(response) == 408
    assert error_of(response)["code"] == "request_timeout"
    assert "The body took too long to arrive" in error_of(response)["message"]
    assert b"\r\nconnection: close\r\n" in response.lower()


@both
def test_a_large_body_has_time_by_the_bytes_that_arrived(serve_both, quick, monkeypatch, where):
    monkeypatch.setattr(bodies, "BODY_SECONDS", 0.1)
    monkeypatch.setattr(bodies, "MIN_BYTES_PER_SECOND", 1 / SECONDS)  # a byte is worth a minute
    connection = serve_both(where).connect(begin())
    assert not is_answered(connection, 0.5)
    assert finish(connection) == 200


@both
def test_a_body_has_an_end_however_steadily_it_arrives(serve_both, quick, monkeypatch, where):
    monkeypatch.setattr(bodies, "MAX_BODY_SECONDS", 0.3)
    monkeypatch.setattr(bodies, "MIN_BYTES_PER_SECOND", 1 / SECONDS)
    response = read_all(serve_both(where).connect(begin()))
    assert status_of(response) == 408


@both
def test_slow_bodies_of_a_client_have_slots_and_quick_requests_need_none(
    serve_both, quick, monkeypatch, where
):
    monkeypatch.setattr(bodies, "CLIENT_SLOTS", 2)
    listening = serve_both(where)
    slow = [listening.connect(begin()) for _ in range(3)]
    status, error = first_answered(slow)
    assert status == 429
    assert error["code"] == "too_many_bodies"
    assert "2 other bodies of this client still arrive" in error["message"]
    with httpx.Client(base_url=listening.url, timeout=SECONDS) as client:
        assert client.post(DRAW, json={"prompt": "a dog"}).status_code == 200
        assert client.get("/readyz").status_code == 200
    assert [finish(connection) for connection in slow] == [200, 200]
    again = listening.connect(begin())  # their slots are free
    assert not is_answered(again, 0.3)
    assert finish(again) == 200


@both
def test_a_client_that_leaves_gives_its_slot_back(serve_both, quick, monkeypatch, where):
    monkeypatch.setattr(bodies, "CLIENT_SLOTS", 1)
    listening = serve_both(where)
    slow = [listening.connect(begin()) for _ in range(2)]
    assert first_answered(slow)[0] == 429
    slow[0].close()
    again = listening.connect(begin())
    assert not is_answered(again, 0.3)
    assert finish(again) == 200


@both
def test_slow_bodies_of_all_clients_have_a_limit(serve_both, quick, monkeypatch, where):
    monkeypatch.setattr(bodies, "ALL_SLOTS", 1)
    listening = serve_both(where)
    address = ("127.0.0.1", int(listening.url.rpartition(":")[2]))
    slow = []
    for source in ("127.0.0.1", "127.0.0.2"):
        slow.append(socket.create_connection(address, SECONDS, source_address=(source, 0)))
        slow[-1].sendall(begin())
    status, error = first_answered(slow)
    assert status == 503
    assert error["code"] == "overloaded"
    assert finish(slow[0]) == 200


@both
def test_each_key_has_slots_of_its_own(serve_both, quick, monkeypatch, write, where):
    monkeypatch.setattr(bodies, "CLIENT_SLOTS", 1)
    keys = write("keys.yaml", f"alice: {ALICE}\nbob: {BOB}\n")
    listening = serve_both(where, serve={"keys": keys})
    for key in (ALICE, BOB):  # the proxy knows a key once the service has accepted it
        headers = {"Authorization": f"Bearer {key}"}
        assert httpx.get(f"{listening.url}/v1/models", headers=headers).status_code == 200
    slow = [listening.connect(begin(ALICE)) for _ in range(2)]
    assert first_answered(slow)[0] == 429
    others = listening.connect(begin(BOB))
    assert not is_answered(others, 0.3)
    assert finish(others) == 200
    assert finish(slow[0]) == 200


def test_keys_that_the_service_does_not_know_have_no_slots_of_their_own(
    serve_both, quick, monkeypatch, write
):
    monkeypatch.setattr(bodies, "CLIENT_SLOTS", 1)
    keys = write("keys.yaml", f"alice: {ALICE}\n")
    listening = serve_both("proxy", serve={"keys": keys})
    slow = [listening.connect(begin(f"invented-{number}")) for number in range(2)]
    assert first_answered(slow)[0] == 429
    assert finish(slow[0]) == 401


def test_a_reverse_proxy_on_this_machine_names_the_clients_whose_slots_are_counted(
    serve_both, quick, monkeypatch, write
):
    monkeypatch.setattr(bodies, "CLIENT_SLOTS", 1)
    keys = write("keys.yaml", f"alice: {ALICE}\n")
    listening = serve_both("proxy", serve={"keys": keys})
    first, second = (
        listening.connect(begin(ALICE, f"X-Forwarded-For: 192.0.2.{number}\r\n"))
        for number in (1, 2)
    )
    assert not is_answered(first, 0.3)
    assert not is_answered(second, 0.3)
    assert [finish(first), finish(second)] == [200, 200]


@both
def test_a_body_without_its_length_is_read_too(serve_both, where):
    parts = iter([BODY[:5], BODY[5:]])
    answer = httpx.post(
        f"{serve_both(where).url}{DRAW}",
        content=parts,
        headers={"Content-Type": "application/json"},
    )
    assert answer.status_code == 200


@both
def test_a_declared_size_that_is_too_large_is_rejected_before_the_body(serve_both, where):
    listening = serve_both(where)
    head = begin().replace(f"Content-Length: {len(BODY)}".encode(), b"Content-Length: 99999999")
    with listening.connect(head) as connection:
        assert connection.recv(12) == b"HTTP/1.1 413"


def test_the_bytes_of_one_client_leave_room_for_those_of_another(monkeypatch):
    monkeypatch.setattr(bodies, "MAX_BODIES_BYTES", 100)
    all_bodies = Bodies()
    greedy, other, third = (("address", name) for name in ("greedy", "other", "third"))
    all_bodies.add(greedy, 50)
    with pytest.raises(ApiError, match="Too many pictures of this client") as refused:
        all_bodies.add(greedy, 1)
    assert (refused.value.status, refused.value.code) == (429, "too_many_bodies")
    all_bodies.add(other, 20)
    all_bodies.add(("key", "alice"), 50)  # keys share nothing with addresses
    with pytest.raises(ApiError, match="Too many pictures are being received") as refused:
        all_bodies.add(third, 40)
    assert refused.value.status == 503

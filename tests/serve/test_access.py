"""Keys, their limits, and who is answered without any."""

import base64
import itertools
import logging
import time

import pytest

from sdbatch.errors import JobError
from sdbatch.job import Limits, Serve
from sdbatch.serve import access
from sdbatch.serve.access import Access, is_loopback
from sdbatch.serve.errors import Refusal

ALICE, BOB = "alice-" + "0" * 16, "bob-" + "1" * 16


@pytest.fixture
def keys(write):
    return write(
        "keys.yaml", f"alice: {ALICE}\nbob: {{key: {BOB}, limits: {{images: 2, pixels: 4096}}}}\n"
    )


@pytest.fixture
def server(serving, keys):
    return serving(serve={"keys": keys})


def ask(server, key, **body):
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return server.client.post(
        "/v1/images/generations", json={"prompt": "a dog", **body}, headers=headers
    )


def test_who_has_a_key_is_answered(server):
    assert ask(server, ALICE).status_code == 200


@pytest.mark.parametrize("key", [None, "x", ALICE[:-1], ALICE + "0", "ä" * 20])
def test_who_has_none_is_told_to_send_one(server, key):
    headers = {} if key is None else {"Authorization": f"Bearer {key}".encode()}
    answer = server.client.post("/v1/images/generations", json={"prompt": "a"}, headers=headers)
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert "Authorization: Bearer" in answer.json()["error"]["message"]


def test_basic_authentication_carries_the_key_as_its_password(server):
    code = base64.b64encode(f"anyone:{ALICE}".encode()).decode()
    headers = {"Authorization": f"Basic {code}"}
    assert server.client.get("/sdapi/v1/options", headers=headers).status_code == 200
    for broken in (b"Basic !!!", b"Basic \xe9", b"Basic", b"Basic gA=="):
        answer = server.client.get("/sdapi/v1/options", headers={"Authorization": broken})
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("path", ["/", "/docs", "/openapi.json", "/healthz", "/readyz"])
def test_pages_without_secrets_need_no_key(server, path):
    assert server.client.get(path).status_code == 200


@pytest.mark.parametrize(
    "path", ["/metrics", "/v1/models", "/sdapi/v1/options", "/v1/images/jobs/x", "/nowhere"]
)
def test_all_else_needs_a_key(server, path):
    assert server.client.get(path).status_code == 401


def test_a_key_has_limits_of_its_own(server):
    assert ask(server, BOB, n=3).json()["error"]["message"] == "n = 3: must be 2 at most."
    assert ask(server, BOB, size="64x72").status_code == 400
    assert ask(server, BOB, n=2).status_code == 200
    assert ask(server, ALICE, n=3).status_code == 200


def test_too_many_images_a_minute_are_refused_with_when_to_come_again(serving, keys):
    server = serving(serve={"keys": keys, "limits": {"images_per_minute": 4}})
    assert [ask(server, ALICE, n=2).status_code for _ in range(2)] == [200, 200]
    refused = ask(server, ALICE, n=2)
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert 20 <= int(refused.headers["retry-after"]) <= 30  # two of four a minute
    assert ask(server, BOB, n=2).status_code == 200  # another's are another's
    assert ask(server, ALICE, n=5).status_code == 400  # will never be possible


def test_images_of_a_minute_come_back_with_time(monkeypatch):
    clock = itertools.count(0.0, 15.0)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    key = access.Key("k", Limits(images_per_minute=4), counted_at=-15.0)
    key.spend(4)
    key.spend(1)
    with pytest.raises(Refusal):
        key.spend(2)


def test_a_job_is_its_own_keys_alone(server):
    begun = server.client.post(
        "/v1/images/jobs", json={"prompt": "a"}, headers={"Authorization": f"Bearer {ALICE}"}
    ).json()
    for key, status in ((ALICE, 200), (BOB, 404)):
        headers = {"Authorization": f"Bearer {key}"}
        assert server.client.get(begun["poll_url"], headers=headers).status_code == status
    stop = server.client.post(
        f"/v1/images/jobs/{begun['id']}/cancel", headers={"Authorization": f"Bearer {BOB}"}
    )
    assert stop.status_code == 404


def test_keys_of_the_environment_count_too(serving, monkeypatch):
    monkeypatch.setenv("SDBATCH_API_KEYS", f" {ALICE} ,{BOB}")
    server = serving()
    assert [ask(server, key).status_code for key in (ALICE, BOB, None)] == [200, 200, 401]


BROKEN = {
    "short": ("alice: short", "alice.key cannot be used: String should have at least 16"),
    "unknown": (f"a: {{key: {ALICE}, limit: 3}}", "a.limit cannot be used"),
    "limit": (f"a: {{key: {ALICE}, limits: {{images: 0}}}}", "a.images cannot be used"),
    "number": ("alice: 1234567890123456", "alice. cannot be used"),
    "empty": ("", "must hold a line `name: key`"),
    "list": ("[x]", "must hold a line `name: key`"),
    "twice": (f"a: {ALICE}\na: {BOB}", "is no YAML in which each name stands once"),
    "same": (f"a: {ALICE}\nb: {ALICE}", "b has the key of a: give it its own"),
    "no YAML": (f"alice: {ALICE}: x", "is no YAML"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_key_file_that_cannot_be_used_is_named_without_its_keys(write, fault):
    text, words = BROKEN[fault]
    with pytest.raises(JobError, match=r"keys\.yaml") as caught:
        access.read(Serve(keys=write("keys.yaml", text)))
    assert words in str(caught.value)
    assert ALICE not in str(caught.value)
    assert "1234567890123456" not in str(caught.value)


def test_a_key_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(JobError, match=r"serve.keys = .*none.yaml .*must be a readable file"):
        access.read(Serve(keys=str(tmp_path / "none.yaml")))


def test_a_short_key_of_the_environment_is_refused(monkeypatch):
    monkeypatch.setenv("SDBATCH_API_KEYS", "short")
    with pytest.raises(JobError, match="SDBATCH_API_KEYS = a key of 5 characters: must have 16"):
        access.read(Serve())


@pytest.mark.parametrize(
    ("host", "here"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("[::1]", True),
        ("0.0.0.0", False),
        ("192.168.0.1", False),
        ("localhost.evil.example", False),
        ("", False),
        (None, False),
    ],
)
def test_loopback_is_this_machine_alone(host, here):
    assert is_loopback(host) is here


@pytest.mark.parametrize(
    ("headers", "client"),
    [
        ({"host": "localhost:8000"}, "10.0.0.7"),
        ({"host": "localhost:8000"}, None),
        ({"host": "evil.example:8000"}, "127.0.0.1"),  # a name that was made to point here
        ({"host": "localhost:8000", "origin": "http://evil.example"}, "127.0.0.1"),
        ({"host": "localhost:8000", "origin": "null"}, "127.0.0.1"),
        ({}, "127.0.0.1"),
        ({"host": "[::1"}, "127.0.0.1"),
        ({"host": "localhost", "origin": "http://["}, "127.0.0.1"),
        ({"host": "localhost", "x-forwarded-for": "10.0.0.7"}, "127.0.0.1"),
        ({"host": "localhost", "via": "1.1 proxy"}, "127.0.0.1"),
    ],
)
def test_without_keys_nobody_else_is_answered(headers, client):
    with pytest.raises(Refusal, match=r"without keys only programs on this machine") as caught:
        Access({}, Limits()).who(headers, client)
    assert caught.value.status == 403


def test_without_keys_this_machine_is_answered():
    here = Access({}, Limits())
    assert here.who({"host": "127.0.0.1:8000"}, "127.0.0.1").name == "here"
    own = {"host": "[::1]:8000", "origin": "http://[::1]:8000"}
    assert here.who(own, "::1").name == "here"


@pytest.mark.parametrize("told", [False, True])
def test_the_log_has_prompts_only_where_asked_for_and_keys_never(serving, keys, caplog, told):
    server = serving(serve={"keys": keys, "log_prompts": told})
    log = logging.getLogger("ray.serve.sdbatch")
    log.addHandler(caplog.handler)  # where Ray is imported, its loggers hand nothing on
    with caplog.at_level(logging.INFO, log.name):
        ask(server, ALICE, prompt="a secret dog", user="u-1")
    log.removeHandler(caplog.handler)
    assert ("a secret dog" in caplog.text) is told
    assert '"key": "alice"' in caplog.text
    assert '"user": "u-1"' in caplog.text
    assert ALICE not in caplog.text

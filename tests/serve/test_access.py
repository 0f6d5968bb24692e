"""API keys, their limits, and access without a key."""

import base64
import itertools
import logging
import time

import pytest

from sdbatch.errors import JobError
from sdbatch.job import Limits, Serve
from sdbatch.serve import access
from sdbatch.serve.access import Access, is_loopback
from sdbatch.serve.errors import ApiError

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


def test_client_with_a_key_is_answered(server):
    assert ask(server, ALICE).status_code == 200


@pytest.mark.parametrize("key", [None, "x", ALICE[:-1], ALICE + "0", "ä" * 20])
def test_client_without_a_valid_key_is_rejected_with_how_to_send_one(server, key):
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
def test_all_other_routes_need_a_key(server, path):
    assert server.client.get(path).status_code == 401


def test_a_key_has_limits_of_its_own(server):
    assert ask(server, BOB, n=3).json()["error"]["message"] == "n = 3: must be 2 at most."
    assert ask(server, BOB, size="64x72").status_code == 400
    assert ask(server, BOB, n=2).status_code == 200
    assert ask(server, ALICE, n=3).status_code == 200


def test_too_many_images_a_minute_are_rejected_with_the_seconds_to_wait(serving, keys):
    server = serving(serve={"keys": keys, "limits": {"images_per_minute": 4}})
    assert [ask(server, ALICE, n=2).status_code for _ in range(2)] == [200, 200]
    rejected = ask(server, ALICE, n=2)
    assert rejected.status_code == 429
    assert rejected.json()["error"]["code"] == "rate_limit_exceeded"
    assert 20 <= int(rejected.headers["retry-after"]) <= 30  # two of four a minute
    assert ask(server, BOB, n=2).status_code == 200  # each key has its own limit
    assert ask(server, ALICE, n=5).status_code == 400  # no retry can succeed


def test_spent_images_become_available_again_with_time(monkeypatch):
    clock = itertools.count(0.0, 15.0)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    key = access.ApiKey("k", Limits(images_per_minute=4), updated_at=-15.0)
    key.spend(4)
    key.spend(1)
    with pytest.raises(ApiError):
        key.spend(2)


def test_a_job_is_visible_to_its_own_key_only(server):
    job = server.client.post(
        "/v1/images/jobs", json={"prompt": "a"}, headers={"Authorization": f"Bearer {ALICE}"}
    ).json()
    for key, status in ((ALICE, 200), (BOB, 404)):
        headers = {"Authorization": f"Bearer {key}"}
        assert server.client.get(job["poll_url"], headers=headers).status_code == status
    cancelled = server.client.post(
        f"/v1/images/jobs/{job['id']}/cancel", headers={"Authorization": f"Bearer {BOB}"}
    )
    assert cancelled.status_code == 404


def test_keys_of_the_environment_are_accepted(serving, monkeypatch):
    monkeypatch.setenv("SDBATCH_API_KEYS", f" {ALICE} ,{BOB}")
    server = serving()
    assert [ask(server, key).status_code for key in (ALICE, BOB, None)] == [200, 200, 401]


BROKEN = {
    "short": ("alice: short", "alice.key cannot be used: String should have at least 16"),
    "unknown": (f"a: {{key: {ALICE}, limit: 3}}", "a.limit cannot be used"),
    "limit": (f"a: {{key: {ALICE}, limits: {{images: 0}}}}", "a.images cannot be used"),
    "number": ("alice: 1234567890123456", "alice cannot be used"),
    "empty": ("", "must hold a line `name: key`"),
    "list": ("[x]", "must hold a line `name: key`"),
    "twice": (f"a: {ALICE}\na: {BOB}", "must be YAML that has each name once"),
    "same": (f"a: {ALICE}\nb: {ALICE}", "b has the same key as a. Give each name a key of its own"),
    "no YAML": (f"alice: {ALICE}: x", "must be YAML"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_an_invalid_key_file_is_named_without_showing_its_keys(write, fault):
    text, words = BROKEN[fault]
    with pytest.raises(JobError, match=r"keys\.yaml") as caught:
        access.read_keys(Serve(keys=write("keys.yaml", text)))
    assert words in str(caught.value)
    assert ALICE not in str(caught.value)
    assert "1234567890123456" not in str(caught.value)


def test_a_missing_key_file_is_named(tmp_path):
    with pytest.raises(JobError, match=r"serve.keys = .*none.yaml .*must be a readable file"):
        access.read_keys(Serve(keys=str(tmp_path / "none.yaml")))


def test_a_short_key_of_the_environment_is_rejected(monkeypatch):
    monkeypatch.setenv("SDBATCH_API_KEYS", "short")
    with pytest.raises(
        JobError, match="SDBATCH_API_KEYS = a key of 5 characters: must have at least 16"
    ):
        access.read_keys(Serve())


@pytest.mark.parametrize(
    ("host", "loopback"),
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
def test_only_addresses_of_this_machine_are_loopback(host, loopback):
    assert is_loopback(host) is loopback


@pytest.mark.parametrize(
    ("headers", "client"),
    [
        ({"host": "localhost:8000"}, "10.0.0.7"),
        ({"host": "localhost:8000"}, None),
        ({"host": "evil.example:8000"}, "127.0.0.1"),  # a name that points to this machine
        ({"host": "localhost:8000", "origin": "http://evil.example"}, "127.0.0.1"),
        ({"host": "localhost:8000", "origin": "null"}, "127.0.0.1"),
        ({}, "127.0.0.1"),
        ({"host": "[::1"}, "127.0.0.1"),
        ({"host": "localhost", "origin": "http://["}, "127.0.0.1"),
        ({"host": "localhost", "x-forwarded-for": "10.0.0.7"}, "127.0.0.1"),
        ({"host": "localhost", "via": "1.1 proxy"}, "127.0.0.1"),
    ],
)
def test_without_keys_other_machines_and_sites_are_rejected(headers, client):
    with pytest.raises(
        ApiError, match=r"Without API keys the service answers only programs"
    ) as caught:
        Access({}, Serve()).authenticate(headers, client)
    assert caught.value.status == 403


def test_without_keys_clients_on_this_machine_are_answered():
    local = Access({}, Serve())
    assert local.authenticate({"host": "127.0.0.1:8000"}, "127.0.0.1").name == "here"
    headers = {"host": "[::1]:8000", "origin": "http://[::1]:8000"}
    assert local.authenticate(headers, "::1").name == "here"


@pytest.mark.parametrize("log_prompts", [False, True])
def test_the_log_has_prompts_only_if_the_job_says_so_and_never_keys(
    serving, keys, caplog, log_prompts
):
    server = serving(serve={"keys": keys, "log_prompts": log_prompts})
    log = logging.getLogger("ray.serve.sdbatch")
    log.addHandler(caplog.handler)  # Ray's loggers, once it is imported, do not propagate
    with caplog.at_level(logging.INFO, log.name):
        ask(server, ALICE, prompt="a secret dog", user="u-1")
    log.removeHandler(caplog.handler)
    assert ("a secret dog" in caplog.text) is log_prompts
    assert '"key": "alice"' in caplog.text
    assert '"user": "u-1"' in caplog.text
    assert ALICE not in caplog.text

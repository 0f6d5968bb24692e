"""Missing and rejected credentials: one line that names the URL and the way out."""

import base64
import json
import os
import re

import pytest

from sdbatch.errors import StorageError
from sdbatch.storage import Store
from tests.stores import servers
from tests.stores.answers import answering

DENIED = "Permission 'storage.objects.create' denied on resource (or it may not exist)."
KEYS = r".*: must be readable, an output also writable\. Check permissions and keys\.$"


def rejected(url: str, words: str = KEYS) -> None:
    """Assert that listing, reading, writing and creating fail with one line."""
    store = Store(url)
    writes = (lambda: store.put("a", b"1"), lambda: store.create("a", b"1"))
    for use in (*writes, store.names, lambda: store.read("a"), lambda: store.read_if_exists("a")):
        with pytest.raises(StorageError, match=rf"^{url}(/a)? = {words}") as error:
            use()
        assert "\n" not in str(error.value)


@pytest.fixture
def checks_keys(bucket):
    """Let the S3 server accept only keys that it gave out."""
    url = f"{os.environ['AWS_ENDPOINT_URL']}/moto-api/reset-auth"
    servers.post(url, "0")
    yield
    servers.post(url, "inf")


@pytest.mark.usefixtures("checks_keys")
def test_a_key_that_s3_does_not_know_is_rejected(bucket):
    rejected(f"s3://{bucket}/x")


def test_a_token_for_s3_that_has_expired_is_named(monkeypatch):
    expired = "<Error><Code>ExpiredToken</Code><Message>The token has expired.</Message></Error>"
    with answering((400, expired)) as (address, _), servers.fresh("s3"):
        for name, value in servers.s3_settings(address).items():
            monkeypatch.setenv(name, value)
        rejected("s3://bucket/x", r"The token has expired\." + KEYS)


def test_no_key_for_s3(bucket, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with servers.fresh("s3"):
        rejected(f"s3://{bucket}/x", "Unable to locate credentials" + KEYS)


def test_a_key_that_azure_does_not_know_is_rejected():
    with servers.start("az") as place:
        wrong = base64.b64encode(b"wrong").decode()
        with place.with_settings(**servers.az_settings(place.proxy.address, wrong)):
            rejected(f"{place.url}/x")


def test_no_settings_for_azure(monkeypatch):
    pytest.importorskip("adlfs")
    monkeypatch.delenv("AZURE_STORAGE_CONNECTION_STRING", raising=False)
    with servers.fresh("az"):
        rejected("az://datasets/x", r".*connection_string.*its settings \(docs/commands\.md\)\.$")


@pytest.mark.parametrize("status", [401, 403])
def test_a_client_without_permission_from_google_is_rejected(status, monkeypatch):
    pytest.importorskip("gcsfs")
    body = json.dumps({"error": {"code": status, "message": f"Anonymous caller. {DENIED}"}})
    with answering((status, body)) as (address, _):
        for name, value in servers.gs_settings(address).items():
            monkeypatch.setenv(name, value)
        rejected("gs://datasets/x", f".*{re.escape(DENIED)}.*")


def test_creators_on_s3_that_conflict_try_again(monkeypatch):
    def answer(status: int, code: str) -> tuple[int, str]:
        return status, f"<Error><Code>{code}</Code><Message>m</Message></Error>"

    conflict = answer(409, "ConditionalRequestConflict")
    for last, created in (((200, ""), True), (answer(412, "PreconditionFailed"), False)):
        with answering(conflict, conflict, last) as (address, _):
            for name, value in servers.s3_settings(address).items():
                monkeypatch.setenv(name, value)
            with servers.fresh("s3"):
                assert Store("s3://datasets/x").create("a", b"1") is created
    with answering(conflict) as (address, _):
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{address}")
        with servers.fresh("s3"), pytest.raises(StorageError, match=r"^s3://datasets/x/a = "):
            Store("s3://datasets/x").create("a", b"1")

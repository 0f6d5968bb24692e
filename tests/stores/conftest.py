"""Each store in turn, on its server."""

import pytest

from sdbatch import retries
from tests.stores import servers


@pytest.fixture(scope="module", params=["s3", "az", "gs"])
def place(request):
    """A bucket or container on a local server; the environment leads there, as a user's would."""
    with servers.start(request.param) as place:
        yield place


@pytest.fixture(scope="module")
def bucket():
    """The name of a bucket on a local S3 server."""
    with servers.start("s3") as place:
        yield place.url.removeprefix("s3://")


@pytest.fixture(autouse=True)
def one_attempt(monkeypatch):
    """Let a store that fails be given up at once; tests/test_storage.py shows the attempts."""
    monkeypatch.setattr(retries, "BUDGET_SECONDS", 0.0)

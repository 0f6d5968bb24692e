"""A real HTTP server on loopback around the service; the drawer is called directly, without Ray."""

import contextlib
import socket
import threading
import time
from concurrent.futures import Future

import httpx
import pytest
import uvicorn

from sdbatch.engine.engine import Engine
from sdbatch.engine.request import Drawn
from sdbatch.job import parse
from sdbatch.models import find_model
from sdbatch.models.sd1 import loading
from sdbatch.models.sd1.loading import Build
from sdbatch.output.image_file import Encoding
from sdbatch.serve import access, web
from sdbatch.serve.access import Access
from sdbatch.serve.drawer import Drawer
from sdbatch.serve.requests import Offer
from sdbatch.serve.service import Service
from tests.fakes import FakeEngine

ENGINE = {
    "device": "cpu",
    "dtype": "float32",
    "lanes": 8,
    "channels_last": False,
    "compile": False,
}
ENCODING = Encoding("png", 95, "tiny", "0123456789abcdef", "sdbatch test")


def job_of(**sections):
    """Return a resolved job of small images."""
    values = {
        "prompts": {"rows": [{"prompt": "not served"}]},
        "model": "tiny",
        "sampling": {"height": 64, "width": 64, "num_inference_steps": 4, "guidance_scale": 5.0},
        "engine": ENGINE,
        "output": {"path": "nowhere"},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return parse(values)


class Held(FakeEngine):
    """Draws when it is let go; remembers which of its images were cancelled."""

    def __init__(self):
        super().__init__()
        self.waiting = []

    def submit(self, request, *, exact=True, follow=None):
        future: Future[Drawn] = Future()
        self.waiting.append((future, request, follow))
        return future

    def go(self):
        waiting, self.waiting = self.waiting, []
        for future, request, _ in waiting:
            if not future.cancelled():
                future.set_result(self._draw(request))

    @property
    def cancelled(self):
        return sum(future.cancelled() for future, _, _ in self.waiting)


def eventually(holds):
    """Wait until it holds, which the service's own thread brings about."""
    deadline = time.monotonic() + 20
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert holds()


def metric(server, name):
    lines = server.client.get("/metrics").text.splitlines()
    return float(next(line.rsplit(" ", 1)[1] for line in lines if line.startswith(name)))


class Server:
    """The service behind uvicorn in a thread of its own."""

    def __init__(self, drawer, **sections):
        job = job_of(**sections)
        self.job = job
        self.service = Service(Offer(job, "tiny", ENCODING), drawer)
        keys = Access(access.read(job.serve), job.serve.limits)
        application = web.application(self.service, keys, log_prompts=job.serve.log_prompts)
        self._listener = socket.socket()
        self._listener.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._uvicorn = uvicorn.Server(
            uvicorn.Config(application, log_level="error", lifespan="off")
        )
        self._thread = threading.Thread(
            target=self._uvicorn.run, kwargs={"sockets": [self._listener]}, daemon=True
        )
        self._thread.start()
        self.client = httpx.Client(base_url=self.url, timeout=60)
        while not self._uvicorn.started:
            time.sleep(0.01)

    def post(self, path="/v1/images/generations", **body):
        return self.client.post(path, json=body)

    def open_soon(self, images):
        """Wait until so many images are open."""
        deadline = time.monotonic() + 20
        while self.service.open != images and time.monotonic() < deadline:
            time.sleep(0.01)
        assert self.service.open == images

    def close(self):
        self.client.close()
        self._uvicorn.should_exit = True
        self._thread.join()
        self._listener.close()


@pytest.fixture(scope="module")
def tiny_engine(tiny_model):
    model = loading.load(find_model.find(str(tiny_model), None, ""), Build("cpu", "float32"))
    engine = Engine(model, lanes=8, threads=1, pixels=64 * 64)
    yield engine
    engine.close(cancel=True)


@pytest.fixture(scope="module")
def server(tiny_engine):
    """A service with the tiny model and no keys."""
    server = Server(Drawer(lambda: tiny_engine, "flag"))
    yield server
    server.close()


@pytest.fixture
def serving():
    """Start services with other engines or settings; stop them in the end."""
    with contextlib.ExitStack() as stack:

        def start(engine=None, policy="flag", **sections):
            server = Server(Drawer(lambda: engine or FakeEngine(), policy), **sections)
            stack.callback(server.close)
            return server

        yield start

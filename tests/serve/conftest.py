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
from sdbatch.job import Model, Safety, parse
from sdbatch.models import sd1
from sdbatch.models.build import Build
from sdbatch.models.find_model import find_model
from sdbatch.output.image_file import Encoding
from sdbatch.serve import access, web
from sdbatch.serve.access import Access
from sdbatch.serve.drawer import Drawer
from sdbatch.serve.requests import ServedModel
from sdbatch.serve.service import Service
from sdbatch.stages.safety import SafetyPolicy
from tests.fakes import FakeEngine

ENGINE = {
    "device": "cpu",
    "dtype": "float32",
    "lanes": 8,
    "channels_last": False,
    "compile": False,
}
ENCODING = Encoding("png", None, "tiny", "0123456789abcdef", "sdbatch test")


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


class PausedEngine(FakeEngine):
    """Draws when `draw_all` is called; counts which of its images were cancelled."""

    def __init__(self):
        super().__init__()
        self.waiting = []

    def submit(self, request, *, exact=True, follow=None):
        future: Future[Drawn] = Future()
        self.waiting.append((future, request, follow))
        return future

    def draw_all(self):
        waiting, self.waiting = self.waiting, []
        for future, request, _ in waiting:
            if not future.cancelled():
                future.set_result(self._draw(request))

    @property
    def cancelled(self):
        return sum(future.cancelled() for future, _, _ in self.waiting)


def eventually(condition):
    """Wait until the service's own thread has made `condition()` true."""
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def metric(server, name):
    lines = server.client.get("/metrics").text.splitlines()
    return float(next(line.rsplit(" ", 1)[1] for line in lines if line.startswith(name)))


class Server:
    """The service behind uvicorn in a thread of its own."""

    def __init__(self, drawer, **sections):
        job = job_of(**sections)
        self.job = job
        self.service = Service(ServedModel(job, "tiny", ENCODING), drawer)
        keys = Access(access.read_keys(job.serve), job.serve.limits)
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

    def wait_for_pending(self, images):
        """Wait until `images` images wait or are being drawn."""
        deadline = time.monotonic() + 20
        while self.service.pending != images and time.monotonic() < deadline:
            time.sleep(0.01)
        assert self.service.pending == images

    def close(self):
        self.client.close()
        self._uvicorn.should_exit = True
        self._thread.join()
        self._listener.close()


@pytest.fixture(scope="module")
def tiny_engine(tiny_model):
    files = find_model(Model(path=str(tiny_model)), Safety(checker="none"))
    family = sd1.load(files, Build("cpu", "float32"))
    engine = Engine(family, lanes=8, threads=1, pixels=64 * 64)
    yield engine
    engine.close(cancel=True)


@pytest.fixture(scope="module")
def server(tiny_engine):
    """A service with the tiny model and no keys."""
    server = Server(Drawer(lambda: tiny_engine, SafetyPolicy("flag")))
    yield server
    server.close()


@pytest.fixture
def serving():
    """Start services with other engines or settings; stop them at the end."""
    with contextlib.ExitStack() as stack:

        def start(engine=None, policy="flag", **sections):
            drawer = Drawer(lambda: engine or FakeEngine(), SafetyPolicy(policy))
            server = Server(drawer, **sections)
            stack.callback(server.close)
            return server

        yield start

"""A real HTTP server on loopback around the service; the drawer is called directly, without Ray."""

import asyncio
import base64
import contextlib
import io
import threading
from concurrent.futures import Future
from dataclasses import replace

import httpx
import numpy as np
import pytest
from PIL import Image

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
from sdbatch.serve.queue import ImageQueue
from sdbatch.serve.requests import ServedModel
from sdbatch.serve.service import Service
from sdbatch.stages.safety import SafetyPolicy
from tests.fakes import FakeEngine
from tests.serve.listening import SECONDS, Listening

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
        "model": {"path": "tiny"},
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
        self._changed = threading.Condition()

    def submit(self, request, *, exact=True, follow=None):
        future: Future[Drawn] = Future()
        future.add_done_callback(self._notify)
        self.waiting.append((future, request, follow))
        self._notify()
        return future

    def draw_all(self):
        waiting, self.waiting = self.waiting, []
        for future, request, _ in waiting:
            if future.set_running_or_notify_cancel():  # a client may leave at any moment
                future.set_result(self._draw(request))

    @property
    def cancelled(self):
        return sum(future.cancelled() for future, _, _ in self.waiting)

    def wait_for(self, *, waiting=0, cancelled=0):
        """Wait until it has at least `waiting` images, of which `cancelled` are cancelled."""

        def reached():
            return len(self.waiting) >= waiting and self.cancelled >= cancelled

        with self._changed:
            assert self._changed.wait_for(reached, SECONDS), (len(self.waiting), self.cancelled)

    def _notify(self, *_):
        with self._changed:
            self._changed.notify_all()


def file_of(pixels, image_format="PNG"):
    """Return pixels, (H, W) or (H, W, 1 to 4) uint8, as an image file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, image_format)
    return file.getvalue()


def base64_of(pixels):
    return base64.b64encode(file_of(pixels)).decode()


def pixels_of(b64):
    """Return the pixels, (H, W, 3), of an image file in base64."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64))).convert("RGB"))


PHOTO = np.random.default_rng(3).integers(0, 256, (64, 64, 3), np.uint8)
LEFT = np.zeros((64, 64), np.uint8)  # a mask: its left half is white
LEFT[:, :32] = 255


class Recorder(FakeEngine):
    """Records its requests; of a request with a picture it draws the picture's negative."""

    def __init__(self):
        super().__init__()
        self.requests = []

    def _draw(self, request):
        self.requests.append(request)
        drawn = super()._draw(request)
        picture = request.inputs.get("image")
        return drawn if picture is None else replace(drawn, image=255 - picture)


class WatchedQueue(ImageQueue):
    """Lets a test wait for a number of pending images."""

    def __init__(self, *args):
        super().__init__(*args)
        self._changed = threading.Condition()

    def wait_for_pending(self, images):
        with self._changed:
            assert self._changed.wait_for(lambda: self.pending == images, SECONDS), self.pending

    def reserve(self, image_request, key):
        reservation = super().reserve(image_request, key)
        self._notify()
        return reservation

    def _release(self, reservation):
        super()._release(reservation)
        self._notify()

    def _notify(self):
        with self._changed:
            self._changed.notify_all()


def metric(server, name):
    lines = server.client.get("/metrics").text.splitlines()
    return float(next(line.rsplit(" ", 1)[1] for line in lines if line.startswith(name)))


class Server:
    """The service behind uvicorn in a thread of its own."""

    def __init__(self, drawer, **sections):
        job = job_of(**sections)
        self.job = job
        self.drawer = drawer
        self.service = Service(ServedModel(job, "tiny", ENCODING), drawer)
        self.service.queue = WatchedQueue(job.serve, self.service.metrics)
        keys = Access(access.read_keys(job.serve), job.serve)
        application = web.application(self.service, keys)
        self.application = application
        self.listening = Listening(application)
        self.url = self.listening.url
        self.client = httpx.Client(base_url=self.url, timeout=60)
        self._loop = self.listening.loop

    def post(self, path="/v1/images/generations", **body):
        return self.client.post(path, json=body)

    def wait_for_pending(self, images):
        """Wait until `images` images wait or are being drawn."""
        self.service.queue.wait_for_pending(images)

    def drain(self, seconds):
        """Begin to shut the service down; return the future of how many images are left."""
        begun = threading.Event()

        async def drain():
            draining = asyncio.ensure_future(self.service.drain(seconds))
            self._loop.call_soon(begun.set)  # runs after the first step of `draining`
            return await draining

        images_left = asyncio.run_coroutine_threadsafe(drain(), self._loop)
        assert begun.wait(SECONDS)
        return images_left

    def close(self):
        self.client.close()
        self.listening.close()


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
def recorder():
    return Recorder()


@pytest.fixture
def serving():
    """Start services with other engines or settings; stop them at the end."""
    with contextlib.ExitStack() as stack:

        def start(engine=None, policy="flag", drawer_type=Drawer, **sections):
            drawer = drawer_type(lambda: engine or FakeEngine(), SafetyPolicy(policy))
            server = Server(drawer, **sections)
            stack.callback(server.close)
            return server

        yield start


@pytest.fixture
def recording(serving, recorder):
    """A service that records the engine's requests in `recorder`."""
    return serving(recorder)

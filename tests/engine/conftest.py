"""One tiny model for all engine tests, and engines that close."""

import threading

import pytest

from sdbatch.engine.engine import Engine
from sdbatch.engine.request import Request
from sdbatch.models import find_model
from sdbatch.models.sd1 import loading
from sdbatch.models.sd1.family import StableDiffusion1
from sdbatch.models.sd1.loading import Build
from tests import tiny


@pytest.fixture(scope="session")
def model(tiny_model):
    return loading.load(find_model.find(str(tiny_model), None, ""), Build("cpu", "float32"))


@pytest.fixture(scope="session")
def other_model(tmp_path_factory):
    """A model of the tiny one's shape with other weights."""
    folder = tmp_path_factory.mktemp("other-model")
    tiny.write_folder(folder, seed=1)
    return folder


@pytest.fixture(scope="session")
def engine(model):
    engine = Engine(model, lanes=8, threads=1)
    yield engine
    engine.close()


@pytest.fixture
def new_engine(model):
    """Start engines; close them in the end."""
    started = []

    def start(lanes=4) -> Engine:
        started.append(Engine(model, lanes=lanes, threads=1))
        return started[-1]

    yield start
    for engine in started:
        engine.close(cancel=True)


@pytest.fixture
def held(monkeypatch):
    """Hold the UNet back, so that requests queue up; returns the event that lets it go."""
    go = threading.Event()
    denoise = StableDiffusion1.denoise

    def wait(*args):
        go.wait()
        return denoise(*args)

    monkeypatch.setattr(StableDiffusion1, "denoise", wait)
    yield go
    go.set()


@pytest.fixture
def request_for():
    """Build a request over small defaults."""

    def make(**values) -> Request:
        defaults = {
            "prompt": "a red dog",
            "negative_prompt": "",
            "seed": 7,
            "sampler": "dpmpp_2m",
            "num_inference_steps": 6,
            "guidance_scale": 5.0,
            "height": 64,
            "width": 64,
        }
        return Request(**{**defaults, **values})

    return make

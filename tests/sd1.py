"""Fixtures of the tiny Stable Diffusion 1.x: its parts, and engines that draw with it."""

import pytest

from sdbatch.engine.engine import Engine
from sdbatch.engine.request import Request
from sdbatch.job import Model, Safety
from sdbatch.models.build import Build
from sdbatch.models.find_model import find_model
from sdbatch.models.sd1 import loading
from sdbatch.models.sd1.family import StableDiffusion1
from tests import tiny

BUILD = Build("cpu", "float32")


@pytest.fixture(scope="session")
def model(tiny_model):
    return loading.load(find_model(Model(path=str(tiny_model)), Safety(checker="none")), BUILD)


@pytest.fixture(scope="session")
def other_model(tmp_path_factory):
    """A model of the tiny one's shape with other weights."""
    folder = tmp_path_factory.mktemp("other-model")
    tiny.write_folder(folder, seed=1)
    return folder


@pytest.fixture
def new_engine(model):
    """Start engines; close them in the end."""
    started = []

    def start(lanes=4) -> Engine:
        started.append(Engine(StableDiffusion1(model), lanes=lanes, threads=1))
        return started[-1]

    yield start
    for engine in started:
        engine.close(cancel=True)


def build_request(**values) -> Request:
    """Build a request over small defaults."""
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


@pytest.fixture
def request_for():
    return build_request

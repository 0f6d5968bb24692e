"""The families that the engine is tested with, and engines that close.

Every property of the engine holds for Stable Diffusion 1.x and for a family unlike it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from sdbatch import registry
from sdbatch.engine.engine import Engine
from sdbatch.engine.request import Request
from sdbatch.job import Model, Safety
from sdbatch.models.build import Build
from sdbatch.models.find_model import find_model
from sdbatch.samplers import NAMES
from tests import flow_family
from tests.engine.faulty_family import FaultyFamily, Hold
from tests.sd1 import build_request

BUILD = Build("cpu", "float32")
CACHE_INTERVALS = (1, 1, 2, 3)


@dataclass(frozen=True)
class Kind:
    """A kind of family, and what its requests may be."""

    name: str
    folder: str
    samplers: tuple[str, ...]
    defaults: dict[str, Any]
    keys: dict[str, tuple] = field(default_factory=dict)  # of its own -> values to try
    draws_from_pictures: bool = False

    def load(self, build: Build = BUILD):
        with pytest.MonkeyPatch.context() as patch:
            flow_family.register(patch)
            files = find_model(Model(path=self.folder), Safety(checker="none"))
        return registry.load(files.family).load(files, build)


@pytest.fixture(scope="session", params=["sd1", "flow"])
def kind(request, tiny_model, tmp_path_factory) -> Kind:
    if request.param == "sd1":
        own = {
            "clip_skip": (0, 0, 1),
            "prompt_weights": (False, True),
            "chunk_prompts": (False, True),
            "cache_interval": CACHE_INTERVALS,
            "prompt_b": ("", "a blue cat"),
            "strength": (0.2, 0.8, 1.0),
            "compat": ("diffusers", "a1111"),
            "sample_posterior": (False, True),
            "mask_fill": ("original", "noise", "nothing"),
        }
        return Kind("sd1", str(tiny_model), NAMES, {"sampler": "dpmpp_2m"}, own, True)
    folder = tmp_path_factory.mktemp("flow") / "model"
    flow_family.write_folder(folder)
    return Kind(
        "flow", str(folder), ("euler",), {"sampler": "euler"}, {"cache_interval": CACHE_INTERVALS}
    )


@pytest.fixture(scope="session")
def family(kind):
    return kind.load()


@pytest.fixture
def faulty(family) -> FaultyFamily:
    """The family of the engines that `new_engine` starts."""
    return FaultyFamily(family)


@pytest.fixture(scope="session")
def engine(family):
    engine = Engine(family, lanes=8, threads=1)
    yield engine
    engine.close()


@pytest.fixture
def new_engine(faulty):
    """Start engines; close them in the end."""
    started = []

    def start(lanes=4) -> Engine:
        started.append(Engine(faulty, lanes=lanes, threads=1))
        return started[-1]

    yield start
    for engine in started:
        engine.close(cancel=True)


@pytest.fixture
def held(faulty):
    """Hold the denoiser back, so that requests queue up."""
    faulty.on_denoise = hold = Hold()
    yield hold
    hold.release()


@pytest.fixture
def request_for(kind) -> Callable[..., Request]:
    """Build a request over small defaults."""

    return lambda **values: build_request(**{**kind.defaults, **values})

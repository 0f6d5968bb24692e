"""Models in tests: find them, load them, draw with them, compare what comes out."""

import os

import numpy as np
import torch

from benchmarks import oracle
from sdbatch.engine.engine import Engine
from sdbatch.engine.request import Drawn, Request
from sdbatch.job import Model, Safety
from sdbatch.job.sections import Embedding, Lora
from sdbatch.models import find_model, safety_checker
from sdbatch.models.build import Build
from sdbatch.models.find_model import ModelFiles
from sdbatch.models.sd1 import LAYOUT, loading
from sdbatch.models.sd1.family import StableDiffusion1
from tests.sd1 import BUILD

# One count in 255: the UNet's batch shape differs, which moves float32 by about 1e-6, and rounding
# to uint8 can then fall to the other side. benchmarks/parity.py shows the latents' differences.
MOST_COUNTS = 1
# Keys of a job that name a file besides the model; `settings_with` gives each a value.
LORA_KEY, EMBEDDING_KEY, VAE_KEY = "model.loras.1.path", "model.embeddings.1.path", "model.vae"
CHECKER_KEY = "safety.checker"


def find(path, checker="auto", **settings) -> ModelFiles:
    """Find the model that a job with these settings names."""
    return find_model.find_model(Model(path=str(path), **settings), Safety(checker=checker))


def load(path, build: Build = BUILD, **settings) -> loading.Model:
    """Find a model and load its parts."""
    return loading.load(find(path, **settings), build)


def load_with_checker(files: ModelFiles, build: Build = BUILD):
    """Load a model's parts, and its safety checker if it has one."""
    parts = loading.load(files, build)
    return parts, safety_checker.load(files, build)


def settings_with(key: str, path: str) -> dict:
    """Return the settings of a job that names `path` at `key`."""
    return {
        LORA_KEY: {"loras": [Lora(path="lora.safetensors"), Lora(path=path)]},
        EMBEDDING_KEY: {
            "embeddings": [
                Embedding(path="word.pt", token="<a>"),
                Embedding(path=path, token="<b>"),
            ]
        },
        VAE_KEY: {"vae": path},
        CHECKER_KEY: {"checker": path},
    }[key]


def weights(model: loading.Model) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": value
        for name in LAYOUT.weights
        for key, value in getattr(model, name).state_dict().items()
    }


def have_same_weights(one: loading.Model, two: loading.Model) -> bool:
    a, b = weights(one), weights(two)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def unhashed(model: ModelFiles, files) -> list[str]:
    """Return which of `files` can change without a change of the model's hash."""
    before, missed = find_model.sha256(model), []
    for file in files:
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        missed += [str(file)] if find_model.sha256(model) == before else []
        file.write_bytes(content)
    assert find_model.sha256(model) == before
    return missed


def draw(model: loading.Model, requests: list[Request], checker=None) -> list[Drawn]:
    """Draw the requests with an engine of their own."""
    engine = Engine(StableDiffusion1(model), lanes=8, threads=1, checker=checker)
    try:
        return [future.result() for future in [engine.submit(request) for request in requests]]
    finally:
        engine.close()


def difference(one, two) -> int:
    """Return the greatest difference of two pictures, in counts of 255."""
    return np.abs(one.astype(int) - two).max()


def assert_as_diffusers(drawn: Drawn, pipe, request: Request, scheduler_config, **given) -> None:
    """Assert that an image is what diffusers draws; `given` is as for oracle.draw."""
    reference = oracle.draw(pipe, request, scheduler_config, **given)
    assert difference(drawn.image, oracle.counts(reference)) <= MOST_COUNTS


class RunsCode:
    """Its pickle makes a file OWNED in the working folder."""

    def __reduce__(self):
        return (os.system, ("touch OWNED",))

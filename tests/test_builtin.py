"""The embedded model: a normal one of diffusers, and its pictures show what their prompts say."""

import json
import random
import shutil

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from sdbatch.engine.engine import Engine
from sdbatch.engine.request import Request
from sdbatch.errors import ModelError
from sdbatch.models import find_model
from sdbatch.models.sd1 import LAYOUT
from sdbatch.models.sd1.family import StableDiffusion1
from sdbatch.registry import EMBEDDED_MODEL
from sdbatch.resolve import ANY_GPU, EngineConfig, load_engine
from sdbatch.shapes import captions, judge, world
from tests.models.load import assert_as_diffusers, find, load
from training import tokens

GUIDANCE = 2.5
FOLDER = find_model.BUILTIN / "shapes"


@pytest.fixture(scope="module")
def engine():
    engine = Engine(StableDiffusion1(load(EMBEDDED_MODEL)), lanes=16, threads=1)
    yield engine
    engine.close()


def request_of(prompt, seed, guidance=GUIDANCE, steps=25):
    return Request(
        prompt=prompt,
        seed=seed,
        sampler="dpmpp_2m",
        num_inference_steps=steps,
        guidance_scale=guidance,
        height=128,
        width=128,
    )


def draw_and_judge(engine, requests):
    """Draw the requests; return the judge's verdicts on the pictures."""
    drawn = [(request.prompt, engine.submit(request)) for request in requests]
    return [judge.judge_picture(prompt, future.result().image) for prompt, future in drawn]


def fidelity(verdicts):
    """Return the mean fidelity of the pictures to their prompts."""
    return np.mean([judge.fidelity(verdict) for verdict in verdicts])


@pytest.fixture(scope="module")
def held_out():
    """Return prompts whose first shape never had its colour in training."""
    chance = random.Random("test")
    scenes = [world.random_scene(chance, world.is_for_testing) for _ in range(32)]
    return [captions.write_caption(scene, chance) for scene in scenes]


@pytest.fixture(scope="module")
def guided(engine, held_out):
    """Return the judge's verdicts on their pictures, with the guidance that suits the model."""
    return draw_and_judge(
        engine, [request_of(prompt, seed) for seed, prompt in enumerate(held_out)]
    )


def test_the_weights_are_at_most_12_mb_of_float16():
    files = list(FOLDER.rglob("*.safetensors"))
    assert {file.parent.name for file in files} == set(LAYOUT.weights)
    assert sum(file.stat().st_size for file in files) <= 12e6


def test_plain_diffusers_draws_the_same_pictures(engine):
    pipe = StableDiffusionPipeline.from_pretrained(FOLDER)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.unet.dtype == pipe.text_encoder.dtype == torch.float32
    for seed, prompt in enumerate(("a red star on a blue background", "two green rings")):
        request = request_of(prompt, seed, steps=8)
        drawn = engine.submit(request).result()
        assert_as_diffusers(drawn, pipe, request, dict(pipe.scheduler.config))


@pytest.mark.parametrize(
    ("attribute", "least"),
    [
        ("background", 0.9),
        ("colour", 0.9),
        ("position", 0.8),
        ("shape", 0.7),
        ("size", 0.7),
        ("count", 0.6),
    ],
)
def test_its_pictures_obey_held_out_prompts(guided, attribute, least):
    holds = [verdict[attribute] for verdict in guided if verdict[attribute] is not None]
    assert len(holds) >= 10
    assert np.mean(holds) >= least


def test_its_pictures_obey_less_without_guidance(engine, held_out, guided):
    requests = [request_of(prompt, seed, guidance=1.0) for seed, prompt in enumerate(held_out)]
    assert fidelity(guided) > fidelity(draw_and_judge(engine, requests)) + 0.05


def test_its_pictures_obey_nearly_as_well_in_8_steps(engine, held_out, guided):
    requests = [request_of(prompt, seed, steps=8) for seed, prompt in enumerate(held_out)]
    assert fidelity(draw_and_judge(engine, requests)) > fidelity(guided) - 0.05


def test_its_tokenizer_is_the_one_that_training_builds(tmp_path):
    tokens.build_tokenizer().save_pretrained(tmp_path)
    for file in (FOLDER / "tokenizer").iterdir():
        assert json.loads(file.read_text()) == json.loads((tmp_path / file.name).read_text())


def test_a_package_without_its_weights_is_rejected(tmp_path, monkeypatch):
    shutil.copytree(find_model.BUILTIN, tmp_path / "builtin", ignore=only_configs)
    monkeypatch.setattr(find_model, "BUILTIN", tmp_path / "builtin")
    with pytest.raises(ModelError, match=r"shapes: has no weights in text_encoder/"):
        find(EMBEDDED_MODEL)


def only_configs(folder, names):
    return [name for name in names if name.endswith(".safetensors")]


def test_a_machine_whose_package_has_another_model_is_rejected(tmp_path, monkeypatch):
    files = find(EMBEDDED_MODEL)
    shutil.copytree(find_model.BUILTIN, tmp_path / "builtin")
    config = tmp_path / "builtin" / "shapes" / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text() + " ")
    monkeypatch.setattr(find_model, "BUILTIN", tmp_path / "builtin")
    with pytest.raises(ModelError, match="Give all machines the same files and the same sdbatch"):
        find_model.check_hash(files)
    resolved = EngineConfig("cpu", "float32", {ANY_GPU: 2}, 1, channels_last=True, compile=False)
    with pytest.raises(ModelError, match="Give all machines the same files and the same sdbatch"):
        load_engine(files, resolved, Request(prompt=""), must_draw=False)

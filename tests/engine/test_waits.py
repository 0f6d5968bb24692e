"""The engine's thread never waits for the device: on a pretend one, which logs what would wait."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import pretend_device
from sdbatch.engine.engine import Engine
from sdbatch.engine.request import Follow
from sdbatch.job.sections import Lora
from sdbatch.models import safety_checker
from sdbatch.models.build import Build
from sdbatch.models.identify import EDITING, INPAINTING
from sdbatch.models.sd1.family import StableDiffusion1
from sdbatch.samplers import NAMES, SAMPLERS
from tests.engine.faulty_family import FaultyFamily, Hold, OutOfMemory
from tests.models.conftest import write_checker
from tests.models.load import find, load
from tests.models.sd1.test_row_loras import full, plain, write_network
from tests.sd1 import build_request

DEVICES = ("cpu", pretend_device.NAME)
BUILDS = [Build(device, "float32") for device in DEVICES]


@pytest.fixture(scope="module")
def log():
    with pretend_device.active() as log:
        yield log


@pytest.fixture(scope="module")
def models(log, tiny_model):
    """The tiny model on the CPU and on the pretend device."""
    return [load(tiny_model, build) for build in BUILDS]


@pytest.fixture
def assert_without_waits(log):
    """Assert that `draw(model)` on the device waits for nothing and returns what the CPU does."""

    def check(draw, models):
        expected = draw(models[0])
        log.clear()
        images = draw(models[1])
        assert not log.waits
        assert not log.mismatches
        assert log.copies
        assert len(images) == len(expected) > 0
        for one, other in zip(images, expected, strict=True):
            assert np.array_equal(one, other)

    return check


def small(**values):
    return build_request(**{"height": 16, "width": 16, "num_inference_steps": 3, **values})


def draw_all(family, requests, lanes=16, checker=None):
    engine = Engine(family, lanes=lanes, threads=1, checker=checker)
    try:
        futures = [engine.submit(request) for request in requests]
        return [future.result().image for future in futures]
    finally:
        engine.close()


@pytest.mark.parametrize(
    "names", [tuple(SAMPLERS), pytest.param(NAMES, marks=pytest.mark.slow)], ids=["plain", "all"]
)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_no_sampler_waits_for_the_device(assert_without_waits, models, names, prediction):
    requests = [small(sampler=name) for name in names]
    requests += [small(sampler=name, eta=0.5) for name in ("ddim", "tcd")]
    config = {**models[0].scheduler_config, "prediction_type": prediction}
    assert_without_waits(
        lambda model: draw_all(StableDiffusion1(model), requests, lanes=2 * len(requests)),
        [replace(model, scheduler_config=config) for model in models],
    )


def test_text_and_guidance_do_not_wait(assert_without_waits, models):
    requests = [
        small(prompt="a (red:1.3) dog", prompt_weights=True, clip_skip=1),
        small(prompt="a dog and a cat " * 12, chunk_prompts=True),
        small(guidance_stop=0.6, guidance_rescale=0.7),
        small(guidance_start=0.4),
        small(guidance_scale=1.0, height=24),
    ]
    assert_without_waits(lambda model: draw_all(StableDiffusion1(model), requests), models)


def test_loras_by_row_do_not_wait(assert_without_waits, models, tiny_model, tmp_path):
    loras = [
        Lora(name=kind.__name__, path=write_network(tmp_path / f"{i}.safetensors", models[0], kind))
        for i, kind in enumerate((plain, full))
    ]
    requests = [small(loras="plain:0.7"), small(loras="full:0.5, plain:1"), small()]
    assert_without_waits(
        lambda model: draw_all(StableDiffusion1(model), requests),
        [load(tiny_model, build, loras=loras) for build in BUILDS],
    )


def test_a_shared_prefix_does_not_wait(assert_without_waits, models, tiny_model):
    requests = [small(), small(guidance_stop=0.4), small(guidance_scale=1.0)]
    assert_without_waits(
        lambda model: draw_all(StableDiffusion1(model), requests),
        [load(tiny_model, replace(build, rewrites=("shared_prefix",))) for build in BUILDS],
    )


@pytest.mark.parametrize("use", [INPAINTING, EDITING])
def test_what_a_unet_sees_of_a_picture_does_not_wait(assert_without_waits, folders_by_use, use):
    rng = np.random.default_rng(0)
    inputs = {"image": rng.integers(0, 256, (16, 16, 3), np.uint8)}
    requests = [small(inputs=inputs), small(inputs=inputs, guidance_scale=1.0)]
    if use == INPAINTING:
        masked = {**inputs, "mask": rng.integers(0, 256, (16, 16), np.uint8)}
        requests += [small(inputs=masked, compat=each) for each in ("diffusers", "a1111")]
        requests += [small(inputs=masked, sample_posterior=True, strength=1.0), small()]
    assert_without_waits(
        lambda model: draw_all(StableDiffusion1(model), requests),
        [load(folders_by_use[use], build) for build in BUILDS],
    )


def test_the_safety_checker_does_not_wait(assert_without_waits, models, tiny_model, tmp_path):
    write_checker(tmp_path / "checker")
    files = find(tiny_model, checker=str(tmp_path / "checker"))
    checkers = {build.device: safety_checker.load(files, build) for build in BUILDS}
    requests = [small(seed=seed) for seed in range(5)]
    assert_without_waits(
        lambda model: draw_all(
            StableDiffusion1(model), requests, checker=checkers[model.device.type]
        ),
        models,
    )


def test_previews_do_not_wait(assert_without_waits, models):
    def draw_previews(model):
        previews = []
        follow = Follow(lambda step, steps: None, previews.append, previews=2)
        engine = Engine(StableDiffusion1(model), lanes=4, threads=1)
        engine.submit(small(num_inference_steps=6), follow=follow).result()
        engine.close()
        return [preview.image for preview in previews]

    assert_without_waits(draw_previews, models)


def test_images_that_wait_to_be_encoded_hold_no_pinned_memory(log, models):
    engine = Engine(StableDiffusion1(models[1]), lanes=4, threads=1)
    image = engine.submit(small()).result().image
    engine.close()
    assert image.flags.owndata


def test_cancelling_does_not_wait(assert_without_waits, models):
    def draw_and_cancel(model):
        family, hold = FaultyFamily(StableDiffusion1(model)), Hold()
        family.on_denoise = hold
        engine = Engine(family, lanes=8, threads=1)
        futures = [engine.submit(small(sampler="euler"))]
        hold.wait()  # the next two join as one cohort
        futures += [engine.submit(small(seed=seed, sampler="unipc")) for seed in (1, 2)]
        family.on_step = lambda requests, _: len(requests) == 2 and futures[1].cancel()
        hold.release()
        images = [futures[i].result().image for i in (0, 2)]
        engine.close()
        assert futures[1].cancelled()
        return images

    assert_without_waits(draw_and_cancel, models)


def test_lanes_are_halved_without_a_wait_when_memory_is_exhausted(assert_without_waits, models):
    def draw_in_fewer(model):
        family = FaultyFamily(StableDiffusion1(model))
        family.on_denoise = full_device = OutOfMemory(most=4)
        images = draw_all(family, [small(seed=seed) for seed in range(4)], lanes=8)
        assert full_device.raised == 1
        return images

    assert_without_waits(draw_in_fewer, models)


def test_an_engine_that_closes_leaves_no_noise_being_drawn(log, models):
    hold = Hold()
    family = FaultyFamily(StableDiffusion1(models[1]))
    family.on_denoise = hold
    engine = Engine(family, lanes=8, threads=1)
    for seed in range(4):
        engine.submit(small(seed=seed, sampler="dpmpp_sde", num_inference_steps=20))
    hold.wait()
    hold.release()
    engine.close(cancel=True)
    for thread in threading.enumerate():
        if thread.name == "sdbatch-noise":
            thread.join()  # at most the noise of one step
    assert "sdbatch-noise" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize(
    ("what", "call"),
    [
        ("item", lambda x: x.sum().item()),
        ("is_nonzero", lambda x: bool(x.sum() > 0)),
        ("to the host", lambda x: x.cpu()),
        ("to the host", lambda x: x.tolist()),
        ("copy from the device", lambda x: torch.empty(2, 2).copy_(x, non_blocking=True)),
        ("copy to the device", lambda x: torch.ones(2).to(x.device)),
        ("copy to the device", lambda x: torch.ones(2).to(x.device, non_blocking=True)),
        ("copy to the device", lambda x: torch.ones(2).pin_memory().to(x.device)),
        ("copy to the device", lambda x: torch.tensor([1.0, 2.0], device=x.device)),
        ("index by a mask", lambda x: x[x > 0]),
        ("index by indices on the host", lambda x: x[torch.tensor([1])]),
        ("nonzero", lambda x: x.nonzero()),
        ("linalg_solve", lambda x: torch.linalg.solve(x, x)),
    ],
)
def test_the_pretend_device_logs_each_wait(log, what, call):
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).to(pretend_device.NAME)
    log.clear()
    with torch.inference_mode():
        call(x)
    assert any(what in each for each in log.waits), log.waits


def test_the_pretend_device_logs_tensors_of_two_devices_and_counts_kernels(log):
    x = torch.ones(2, 2).to(pretend_device.NAME)
    log.clear()
    x.t() + torch.tensor(1.0)  # a scalar of the CPU is taken by any operation
    assert (log.kernels, log.mismatches) == ({"add": 1}, {})
    x + torch.ones(2)
    torch.einsum("k,kc->c", torch.ones(2), x)
    assert log.mismatches.total() == 2


def test_the_pretend_device_lets_pinned_copies_pass(log):
    log.clear()
    x = torch.ones(2).pin_memory().to(pretend_device.NAME, non_blocking=True)
    host = torch.empty(2, pin_memory=True).copy_(x, non_blocking=True)
    assert host.tolist() == [1.0, 1.0]
    assert (log.copies.total() >= 2, log.waits) == (True, {})

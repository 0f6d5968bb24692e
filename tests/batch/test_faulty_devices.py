"""A run whose device has too little memory, cannot draw, or breaks."""

import json
from functools import partial

import pyarrow.dataset as ds
import pytest
import torch

from sdbatch.engine.engine import Engine
from sdbatch.engine.request import Request
from sdbatch.errors import ModelError
from sdbatch.job import Model, Safety
from sdbatch.models import sd1
from sdbatch.models.build import Build
from sdbatch.models.find_model import find_model
from tests.engine.faulty_family import FaultyFamily
from tests.without_ray import draw


def new_engine(on_denoise, warm_up=False):
    """Return an engine that calls `on_denoise` with itself and the latents before each tick."""
    files = find_model(Model(path="builtin:shapes"), Safety(checker="none"))
    family = FaultyFamily(sd1.load(files, Build("cpu", "float32")))
    engine = Engine(family, lanes=8, threads=1)
    family.on_denoise = lambda latents, *_: on_denoise(engine, latents)
    if warm_up:
        engine.warm_up(Request(prompt="", height=64, width=64))
    return engine


def hold_four(engine, latents):
    if len(latents) > 4 and engine.usage.ticks >= 6:
        raise torch.OutOfMemoryError("tried to allocate 20 GiB")


def break_after(ticks, engine, latents):
    if engine.usage.ticks >= ticks:
        raise RuntimeError("no kernel image is available for execution on the device")


small_device = partial(new_engine, hold_four)
broken_device = partial(new_engine, partial(break_after, 0), warm_up=True)
device_that_breaks = partial(new_engine, partial(break_after, 6), warm_up=True)


def test_a_run_goes_on_in_fewer_lanes_and_says_so(make_job, prompts, tmp_path):
    job = make_job(
        prompts={"path": prompts(*(f"dog {i}" for i in range(12)))},
        sampling={"num_inference_steps": 4},
        output={"images_per_shard": 6},
    )
    report = draw(job, make_engine=small_device)
    assert (report.images, report.failed, report.stopped) == (12, 0, None)
    assert ds.dataset(tmp_path / "out" / "data").count_rows() == 12
    assert report.engines.lanes == {"8": 4, "4": 8}
    assert "reduced to 4 lanes (OutOfMemoryError: tried to allocate 20 GiB)" in report.text()
    receipts = [json.loads(p.read_text()) for p in (tmp_path / "out" / "receipts").iterdir()]
    assert sum(receipt["facts"]["lanes"].get("4", 0) for receipt in receipts) == 8


def test_a_model_that_cannot_draw_on_the_device_ends_the_run_before_it_writes(
    make_job, prompts, tmp_path
):
    job = make_job(prompts={"path": prompts("a dog")})
    with pytest.raises(
        ModelError,
        match=r"cannot draw on this device \(RuntimeError: no kernel image.*engine.dtype",
    ):
        draw(job, make_engine=broken_device)
    assert not (tmp_path / "out" / "data").exists()
    assert not (tmp_path / "out" / "job.yaml").exists()


def test_a_device_that_breaks_ends_the_run_and_fails_no_row(make_job, prompts, tmp_path):
    table = prompts(*(f"dog {i}" for i in range(12)))
    sampling, output = {"num_inference_steps": 4}, {"images_per_shard": 4}
    job = make_job(prompts={"path": table}, sampling=sampling, output=output)
    report = draw(job, make_engine=device_that_breaks)
    assert report.exit_code == 1
    assert "cannot draw on this device (RuntimeError: no kernel image" in report.stopped
    assert report.failed == 0
    assert report.images == 4
    again = draw(job, make_engine=small_device)
    assert (again.images, again.failed, again.exit_code) == (12, 0, 0)

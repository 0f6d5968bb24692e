"""Stages that draw an image again from itself, with other values."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sdbatch.batch.isolation import IsolatedDrawing
from sdbatch.engine.request import Request
from sdbatch.errors import JobError
from sdbatch.stages.draw import DrawImages, drawn_again, request_rows
from tests.fakes import Inverter
from tests.finished import SIDE, encoding, finish, read_stage, small_job
from tests.sd1 import model, new_engine  # noqa: F401  fixtures

LARGER = {"draw": {"height": 2 * SIDE, "width": 2 * SIDE, "strength": 0.5}}
PNG = {"image_format": "png"}


def images_in(folder):
    files = pq.read_table(folder / "data")["image"].to_pylist()
    return [np.asarray(Image.open(io.BytesIO(file["bytes"]))) for file in files]


@pytest.mark.parametrize("times", [1, 2])
def test_an_image_is_drawn_again_from_itself_at_its_new_size(make_job, tmp_path, times):
    once, again = tmp_path / "once", tmp_path / "again"
    plain = small_job(make_job, tmp_path, output={**PNG, "path": str(once)})
    twice = small_job(
        make_job, tmp_path, output={**PNG, "path": str(again)}, stages=[LARGER] * times
    )
    finish(plain, Inverter)
    finish(twice, Inverter)
    for before, after in zip(images_in(once), images_in(again), strict=True):
        assert after.shape == (2 * SIDE, 2 * SIDE, 3)
        assert (after[0, 0] == (255 - before[0, 0] if times == 1 else before[0, 0])).all()


def test_a_row_that_cannot_be_drawn_again_fails_with_the_reason(
    make_job,
    tmp_path,
    new_engine,  # noqa: F811
):
    table = pa.table({"prompt": ["a", "b"], "num_inference_steps": [1, 50]})
    job = small_job(make_job, tmp_path, table, stages=[{"draw": {"strength": 0.1}}], output=PNG)
    finished = finish(job, lambda: new_engine(lanes=4))
    assert (finished.report.images, finished.report.failed) == (1, 1)
    assert "strength = 0.1: must leave a step" in next(iter(finished.report.reasons))


def test_isolated_rows_are_drawn_again_too(make_job, tmp_path):
    _, read, (block, *_) = read_stage(small_job(make_job, tmp_path, ["a", "b"], output=PNG))
    stage = DrawImages(Inverter, encoding("png"), again=[LARGER["draw"]])
    drawing = IsolatedDrawing(stage, request_rows(read(block)), {})
    drawing.start()
    for result in drawing.done.result(120):
        size = Image.open(io.BytesIO(result["image"]["bytes"])).size
        assert size == (2 * SIDE, 2 * SIDE)


def test_values_that_are_left_out_are_the_rows_own_and_the_size_is_the_images():
    request = Request(prompt="a dog", height=64, width=48, seed=3, hires_scale=2, strength=0.6)
    image = np.zeros((128, 96, 3), np.uint8)
    again = drawn_again(request, {"num_inference_steps": 7}, image)
    assert (again.height, again.width, again.hires_scale) == (128, 96, 1)
    assert (again.seed, again.strength, again.num_inference_steps) == (3, 0.6, 7)
    assert again.inputs["image"].shape == (128, 96, 3)


def test_a_picture_of_any_size_is_drawn_again_in_the_size_below_that_can_be_drawn():
    again = drawn_again(Request(prompt="a dog"), {}, np.zeros((90, 101, 3), np.uint8))
    assert (again.height, again.width) == (88, 96)
    assert again.inputs["image"].shape == (88, 96, 3)
    with pytest.raises(ValueError, match=r"^drawn again: height = 4104: must be less .* 4096$"):
        drawn_again(Request(prompt="a dog"), {}, np.zeros((4104, 8, 3), np.uint8))


def test_an_image_that_is_drawn_again_is_fitted_as_its_row_says():
    image = np.zeros((64, 128, 3), np.uint8)
    image[:, 32:96] = 255
    request = Request(prompt="a dog", fit="crop", resample="nearest")
    again = drawn_again(request, {"height": 64, "width": 64}, image)
    assert (again.inputs["image"] == 255).all()


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ({"draw": {}}, r"stages.0 = \{'draw': \{\}\}: must be one of draw, score with its value"),
        ({"draw": None}, "must be one of draw, score with its value"),
        ({"draw": "score"}, "stages.0.draw = 'score': must be a section of keys"),
        ({"draw": {"strenth": 1}}, "stages.0.draw.strenth: unknown key. Did you mean .*strength"),
        ({"draw": {"strength": 2}}, "stages.0.draw.strength = 2: must be less than or equal to 1"),
        ({"draw": {"eta": 0.5}}, "stages.0.draw.eta = 0.5: must be 0, dpmpp_2m has no eta"),
    ],
)
def test_a_stage_that_could_draw_nothing_is_an_error_of_the_job(make_job, stage, words):
    with pytest.raises(JobError, match=words):
        make_job(stages=[stage])


def test_images_are_drawn_again_before_they_are_scored(make_job):
    with pytest.raises(JobError, match=r"stages.1 = draw: must come before stages that look"):
        make_job(stages=[{"score": "shapes"}, LARGER])


def test_the_job_keeps_only_the_keys_that_a_stage_sets(make_job):
    job = make_job(stages=[LARGER, {"score": "shapes"}])
    assert job.model_dump(mode="json")["stages"] == [LARGER, {"score": "shapes"}]

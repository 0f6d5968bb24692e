"""The drawing stage with pictures: what the engine gets, and what is put back."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sdbatch import resolve, schema
from sdbatch.batch.isolation import IsolatedDrawing
from sdbatch.stages.draw import DrawImages, request_rows
from tests.fakes import Inverter
from tests.finished import SIDE, encoding, finish, read_stage, small_job
from tests.pictures import colours, save, sha256

PIXELS = colours(SIDE, SIDE)
HALF = np.zeros((SIDE, SIDE), np.uint8)
HALF[:, SIDE // 2 :] = 255
TABLE = pa.table(
    {
        "prompt": ["text", "picture", "masked", "fail", "damaged"],
        "image": [None, *[save(PIXELS)] * 3, b"no picture"],
        "mask_image": [None, None, save(HALF), None, None],
    }
)
MASKED = np.where(HALF[..., None] > 0, 255 - PIXELS, PIXELS)


def pixels_of(file):
    return np.asarray(Image.open(io.BytesIO(file)))


def job_of(make_job, tmp_path, **sections):
    output = {"images_per_shard": 5, "image_format": "png", **sections.pop("output", {})}
    return small_job(make_job, tmp_path, TABLE, output=output, **sections)


def results_of(rows):
    """Check the images of TABLE's rows, in order."""
    text, picture, masked, failed, damaged = rows
    assert len(np.unique(pixels_of(text["image"]["bytes"]).reshape(-1, 3), axis=0)) == 1
    assert np.array_equal(pixels_of(picture["image"]["bytes"]), 255 - PIXELS)
    assert np.array_equal(pixels_of(masked["image"]["bytes"]), MASKED)
    assert failed["error"] == "ValueError: this prompt cannot be drawn"
    assert "must be a picture file" in damaged["error"]


def test_a_row_is_drawn_from_its_picture_and_unmasked_pixels_come_back(make_job, tmp_path):
    finished = finish(job_of(make_job, tmp_path), Inverter)
    assert (finished.report.images, finished.report.failed) == (3, 2)
    drawn = pq.read_table(finished.folder / "data/000000.parquet")
    failed = pq.read_table(finished.folder / "failed/000000.parquet")

    assert drawn.schema.names == schema.images(pa.schema([])).names
    assert drawn["image_sha256"].to_pylist() == [None, *[sha256(save(PIXELS))] * 2]
    assert drawn["mask_sha256"].to_pylist() == [None, None, sha256(save(HALF))]
    results_of([*drawn.to_pylist(), *failed.to_pylist()])
    assert finished.report.from_pictures == 2


def test_isolated_rows_are_drawn_from_their_pictures_too(make_job, tmp_path):
    _, read, (block,) = read_stage(job_of(make_job, tmp_path))
    stage = DrawImages(Inverter, encoding("png"))
    drawing = IsolatedDrawing(stage, request_rows(read(block)), {})
    drawing.start()
    results_of(drawing.done.result(120))


@pytest.mark.parametrize("use", ["inpainting", "editing"])
def test_models_that_see_a_picture_draw_a_table_whose_rows_choose(
    make_job, tmp_path, folders_by_use, use
):
    job = job_of(
        make_job,
        tmp_path,
        model={"path": str(folders_by_use[use])},
        engine={"device": "cpu", "dtype": "float32", "lanes": 4},
    )
    files, job = resolve.find_model(job)
    make_engine = resolve.resolve(job, files, 0, None).make_engine()
    finished = finish(job, make_engine)
    drawn = {
        row["prompt"]: pixels_of(row["image"]["bytes"])
        for row in pq.read_table(finished.folder / "data/000000.parquet").to_pylist()
    }
    failed = {
        row["prompt"]: row["error"]
        for row in pq.read_table(finished.folder / "failed/000000.parquet").to_pylist()
    }
    if use == "inpainting":
        assert [*drawn] == ["text", "picture", "masked", "fail"]
        assert np.array_equal(drawn["masked"][HALF == 0], PIXELS[HALF == 0])
        assert not np.array_equal(drawn["masked"][HALF > 0], PIXELS[HALF > 0])
        return
    assert [*drawn] == ["picture", "fail"]
    assert not np.array_equal(drawn["picture"], drawn["fail"])  # another instruction and seed
    assert "image = none: must be a picture, as this model edits" in failed["text"]
    assert "mask_image = a mask: must be none" in failed["masked"]

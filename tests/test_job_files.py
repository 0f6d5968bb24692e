"""The job files of jobs/: the tables here are read, and what the embedded model draws is drawn."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdbatch.engine.engine import Engine
from sdbatch.job import load as load_job
from sdbatch.models.sd1.family import StableDiffusion1
from sdbatch.output.reader import open_images, open_picture
from sdbatch.prompts.check import check_rows
from sdbatch.prompts.table import open_table
from sdbatch.registry import EMBEDDED_MODEL
from tests.finished import finish
from tests.models.load import load

ROOT = Path(__file__).parent.parent
LOCAL = ["captions", "composition", "dataset", "draw_again", "edits", "interpolation", "tiling"]
# Few images and steps; the smallest strength of a row must leave a step.
QUICK = {
    "captions": ["prompts.limit=1"],
    "composition": ["sampling.num_inference_steps=7"],
    "dataset": ["prompts.limit=2"],
    "draw_again": ["prompts.limit=1"],
    "interpolation": ["prompts.limit=1", "prompts.frames=3"],
    "tiling": ["prompts.limit=1"],
}


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def job_of(name, *overrides):
    return load_job(ROOT / "jobs" / f"{name}.yaml", list(overrides))


@pytest.fixture
def drawn(tmp_path):
    """Return a function that draws a job with few steps, and returns the rows of its output."""

    def draw(name):
        quick = ["sampling.num_inference_steps=2", "sampling.guidance_scale=1", *QUICK[name]]
        job = job_of(name, *quick, f"output.path={tmp_path / 'out'}")
        model = load(EMBEDDED_MODEL, tiling=job.model.tiling)
        engine = Engine(StableDiffusion1(model), lanes=4, threads=1)
        finished = finish(job, lambda: engine)
        engine.close()
        assert (finished.report.failed, finished.report.images) == (0, finished.plan.images)
        return list(open_images(finished.store).rows())

    return draw


def pixels_of(name):
    return np.asarray(Image.open(ROOT / "jobs" / "composition" / f"{name}.png"))


@pytest.mark.parametrize("name", LOCAL)
def test_every_row_of_a_job_file_with_a_local_table_can_be_drawn(name):
    job = job_of(name)
    assert check_rows(job, open_table(job.prompts, ())).faults == []


def test_all_other_job_files_have_tables_elsewhere():
    others = {path.stem for path in (ROOT / "jobs").glob("*.yaml")} - set(LOCAL)
    assert all("://" in job_of(name).prompts.paths[0] for name in others)


@pytest.mark.parametrize("name", sorted(set(QUICK) - {"composition"}))
def test_a_job_file_of_the_embedded_model_draws(name, drawn):
    assert {open_picture(row).size for row in drawn(name)} == {(128, 128)}


def test_the_table_of_all_modes_is_drawn_and_keeps_what_its_masks_leave_out(drawn):
    rows = {row["row_key"]: row for row in drawn("composition")}
    modes = {row["mode"] for row in rows.values()}
    assert modes == {
        "image to image",
        "inpainting",
        "only masked",
        "variations",
        "hires fix",
        "prompts over time",
    }
    for mode, image, mask in (
        ("inpainting", "star", "right_half"),
        ("only masked", "four", "corner"),
    ):
        source, masked = pixels_of(image), pixels_of(mask) == 255
        for row in (row for row in rows.values() if row["mode"] == mode):
            result = np.asarray(open_picture(row))
            assert np.array_equal(result[~masked], source[~masked])
            assert not np.array_equal(result[masked], source[masked])

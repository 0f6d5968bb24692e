"""The engine of the draw stage: what its model can draw for no row is refused as it is loaded."""

import pytest

from sdbatch.batch import pipeline
from sdbatch.errors import ModelError
from sdbatch.job import EngineSettings
from sdbatch.models import find_model
from sdbatch.stages.draw import load_engine

SETTINGS = EngineSettings(device="cpu", dtype="float32", lanes=2, channels_last=True, compile=False)


@pytest.mark.parametrize(
    ("asked", "zero_snr", "words"),
    [
        ({"sampler": "lcm"}, None, "num_inference_steps = 60: lcm takes 50 at most"),
        ({"clip_skip": 9}, None, "clip_skip = 9: the text encoder has 2"),
        ({"sampler": "pndm"}, True, "'pndm': cannot draw with a model of zero terminal SNR"),
    ],
)
def test_an_engine_that_cannot_draw_the_example_is_refused(
    make_job, tiny_model, asked, zero_snr, words
):
    job = make_job(
        model={"path": str(tiny_model), "zero_snr": zero_snr},
        sampling={"num_inference_steps": 60, **asked},
    )
    files = find_model.find(str(tiny_model), None, "", pipeline.extras(job))
    with pytest.raises(ModelError, match=f"^sampling: this model cannot draw it: .*{words}"):
        load_engine(files, SETTINGS, 64 * 64, pipeline.example(job))


def test_an_engine_is_loaded_where_every_row_says_what_it_asks_for(tiny_model):
    files = find_model.find(str(tiny_model), None, "")
    load_engine(files, SETTINGS, 64 * 64, None).close()

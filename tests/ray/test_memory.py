"""A device whose memory runs out in the middle of a run."""

import json

import pyarrow.dataset as ds
import torch

from sdbatch.engine.engine import Engine
from sdbatch.job import Model, Safety
from sdbatch.models import sd1
from sdbatch.models.build import Build
from sdbatch.models.find_model import find_model


class SmallDevice(Engine):
    """An engine on a device that holds 4 lanes, and finds it out after 6 ticks."""

    def __init__(self):
        files = find_model(Model(path="builtin:shapes"), Safety(checker="none"))
        super().__init__(sd1.load(files, Build("cpu", "float32")), lanes=8, threads=1)
        denoise = self._family.denoise

        def holds_four(latents, *rest):
            if len(latents) > 4 and self.usage.ticks >= 6:
                raise torch.OutOfMemoryError("tried to allocate 20 GiB")
            return denoise(latents, *rest)

        self._family.denoise = holds_four


def test_a_run_goes_on_in_fewer_lanes_and_says_so(make_job, draw, prompts, tmp_path):
    table = prompts(*(f"dog {i}" for i in range(12)))
    job = make_job(
        prompts={"path": table},
        sampling={"num_inference_steps": 4},
        cluster={"actors": 1},
        output={"images_per_shard": 6},
    )
    report = draw(job, make_engine=SmallDevice)
    assert (report.images, report.failed, report.stopped) == (12, 0, None)
    assert ds.dataset(tmp_path / "out" / "data").count_rows() == 12
    assert report.engines.lanes == {"8": 4, "4": 8}
    assert "reduced to 4 lanes (OutOfMemoryError: tried to allocate 20 GiB)" in report.text()
    receipts = [json.loads(p.read_text()) for p in (tmp_path / "out" / "receipts").iterdir()]
    assert sum(receipt["facts"]["lanes"].get("4", 0) for receipt in receipts) == 8

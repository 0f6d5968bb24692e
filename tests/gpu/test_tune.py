"""Tuning on a GPU, and a job that uses what was found."""

import pytest
import torch

from sdbatch import resolve
from sdbatch.models import find_model
from sdbatch.tune.command import Options, tune

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")


def test_a_gpu_is_tuned_and_a_job_uses_what_was_found(tiny_model, make_job, tmp_path, monkeypatch):
    monkeypatch.setenv("SDBATCH_CACHE", str(tmp_path / "cache"))
    entry = tune(Options(str(tiny_model), "64", "cuda", 120), lambda line: None)
    assert entry.key.device == torch.cuda.get_device_name()
    assert all(line["gb"] > 0 for line in entry.measured if line["ms"] is not None)

    files, job = resolve.find_model(make_job(model=str(tiny_model), engine={"device": "cuda"}))
    found = resolve.resolve(job, files, 1, find_model.sha256(files))
    assert found.job.engine.model_dump().items() >= vars(entry.choice).items()
    found.make_engine()().close()

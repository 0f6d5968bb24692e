"""What an engine does not import, and that all of it works when it is used; in a fresh process."""

import json
import subprocess
import sys

import pytest

PROGRAM = """
import json, sys

from sdbatch import job, resolve
from sdbatch.engine.request import Request
from sdbatch.models import find_model
from sdbatch.models.deferred import deferred_imports

with deferred_imports(compile=False):
    from scipy.optimize import minimize_scalar  # which nobody has foreseen

settings = job.parse({"prompts": {"path": "-"}, "model": "builtin:shapes", "output": {"path": "-"},
                      "sampling": {"height": 64, "width": 64, "num_inference_steps": 2}})
files, settings = resolve.find_model(settings)
resolved = resolve.resolve(settings, files, 0, find_model.sha256(files))
engine = resolved.make_engine()()
def draw(sampler):
    values = settings.sampling.model_dump()
    request = Request(**{**values, "prompt": "a red circle", "seed": 1, "sampler": sampler})
    return engine.submit(request).result().image.std()

found = {"contrast": draw("euler"), "imported": sorted(sys.modules)}
found["beta"], found["lms"] = draw("euler_beta"), draw("lms")

import scipy.stats
import torch
from transformers.loss.loss_for_object_detection import linear_sum_assignment

found["minimum"] = minimize_scalar(lambda x: (x - 2) ** 2).x
found["assigned"] = [side.tolist() for side in linear_sum_assignment([[2, 1], [1, 2]])]
found["compiled"] = torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)).item()
found["named"] = [scipy.stats.__name__, torch._dynamo.__name__, torch._dynamo.__file__ is not None]
engine.close()
print(json.dumps(found, default=float))
"""


@pytest.fixture(scope="module")
def found():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "name", ["scipy.stats", "scipy.integrate", "torch._dynamo", "torch.distributed.tensor", "peft"]
)
def test_an_engine_draws_without_a_module_that_its_job_does_not_use(found, name):
    assert found["contrast"] > 1
    assert name not in found["imported"]


def test_what_was_deferred_works_when_it_is_used(found):
    assert found["beta"] > 1  # scipy.stats
    assert found["lms"] > 1  # scipy.integrate
    assert found["assigned"] == [[0, 1], [1, 0]]  # scipy.optimize, through transformers
    assert found["compiled"] == 2  # torch._dynamo
    assert found["named"] == ["scipy.stats", "torch._dynamo", True]


def test_a_name_that_was_not_foreseen_comes_from_the_module(found):
    assert found["minimum"] == pytest.approx(2)

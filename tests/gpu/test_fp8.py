"""Linear layers in 8 bits on a GPU that multiplies them."""

import numpy as np
import pytest
import torch

from sdbatch.engine.engine import Engine
from sdbatch.engine.request import Request
from sdbatch.models import fp8_linears
from sdbatch.models.build import Build
from sdbatch.models.sd1.family import StableDiffusion1
from tests.models.load import load

pytest.importorskip("torchao", reason="torchao is not installed")
pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available()
    or torch.cuda.get_device_capability() < fp8_linears.LEAST_CAPABILITY,
    reason="no GPU of compute capability 8.9",
)


def request(seed: int) -> Request:
    return Request(
        prompt=f"dog {seed}",
        seed=seed,
        sampler="dpmpp_2m",
        num_inference_steps=5,
        guidance_scale=(1.0, 7.5)[seed % 2],
        height=64,
        width=64,
    )


def test_the_bits_of_a_row_do_not_depend_on_its_neighbours_in_8_bits(tiny_model):
    pictures = {}
    for fp8 in (False, True):
        build = Build("cuda", "bfloat16", channels_last=True, fp8_linears=fp8)
        engine = Engine(StableDiffusion1(load(tiny_model, build)), lanes=8, threads=1)
        alone = [engine.submit(request(seed)).result().image for seed in range(12)]
        together = [engine.submit(request(seed)) for seed in reversed(range(12))][::-1]
        for one, future in zip(alone, together, strict=True):
            assert np.array_equal(one, future.result().image)
        engine.close()
        pictures[fp8] = np.stack(alone)
    assert (pictures[False] != pictures[True]).any()  # the layers are in 8 bits

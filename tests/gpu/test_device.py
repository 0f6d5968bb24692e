"""What only a GPU can show."""

import numpy as np
import pytest
import torch

from sdbatch.engine.engine import Engine
from sdbatch.engine.request import Request
from sdbatch.models.build import Build
from sdbatch.models.sd1.family import StableDiffusion1
from sdbatch.samplers import NAMES
from tests.models.load import load

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_pixels_are_a_function_of_the_row_on_the_gpu(tiny_model, dtype):
    model = load(tiny_model, Build("cuda", dtype))
    engine = Engine(StableDiffusion1(model), lanes=8, threads=1)
    requests = [
        Request(
            prompt=f"dog {i}",
            negative_prompt="",
            seed=i,
            sampler=NAMES[i * 3 % len(NAMES)],
            num_inference_steps=5,
            guidance_scale=(1.0, 7.5)[i % 2],
            height=64,
            width=64,
            cache_interval=(1, 2, 3)[i % 3],
        )
        for i in range(20)
    ]
    alone = [engine.submit(request).result().image for request in requests]
    together = [engine.submit(request) for request in reversed(requests)][::-1]
    for one, future in zip(alone, together, strict=True):
        assert np.array_equal(one, future.result().image)
    engine.close()

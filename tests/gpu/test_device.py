"""What only a GPU can show."""

import numpy as np
import pytest
import torch

from sdbatch.engine.engine import Engine
from sdbatch.engine.request import Request
from sdbatch.models import find_model
from sdbatch.models.sd1 import loading
from sdbatch.samplers import NAMES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_pixels_are_a_function_of_the_row_on_the_gpu(tiny_model, dtype):
    files = find_model.find(str(tiny_model), None, "")
    engine = Engine(loading.load(files, loading.Build("cuda", dtype)), lanes=8, threads=1)
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
        )
        for i in range(20)
    ]
    alone = [engine.submit(request).result().image for request in requests]
    together = [engine.submit(request) for request in reversed(requests)][::-1]
    for one, future in zip(alone, together, strict=True):
        assert np.array_equal(one, future.result().image)
    engine.close()

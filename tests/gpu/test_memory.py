"""A GPU whose memory runs out for real."""

import pytest
import torch

from sdbatch.engine.engine import Engine
from sdbatch.engine.request import Request
from sdbatch.models import find_model
from sdbatch.models.sd1 import loading

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")


@pytest.fixture
def capped():
    """Cap this process's share of the GPU's memory, in bytes; give it back in the end."""
    total = torch.cuda.get_device_properties(0).total_memory

    def cap(most):
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(most / total)

    yield cap
    torch.cuda.set_per_process_memory_fraction(1.0)


def test_lanes_are_halved_until_they_fit(tiny_model, capped):
    files = find_model.find(str(tiny_model), None, "")
    model = loading.load(files, loading.Build("cuda", "float32"))
    requests = [
        Request(
            prompt=f"dog {i}",
            seed=i,
            sampler="euler",
            num_inference_steps=3,
            guidance_scale=5.0,
            height=512,
            width=512,
        )
        for i in range(8)
    ]
    small = Engine(model, lanes=8, threads=1)
    torch.cuda.reset_peak_memory_stats()
    expected = [small.submit(request).result() for request in requests]
    small.close()
    capped(int(2.5 * torch.cuda.max_memory_reserved()))
    large = Engine(model, lanes=128, threads=1)
    drawn = [future.result() for future in [large.submit(request) for request in requests]]
    large.close()
    assert {one.lanes for one in drawn} <= {8, 16, 32, 64}
    assert large.usage.shrunk
    for one, other in zip(drawn, expected, strict=True):
        off = abs(one.image.astype(int) - other.image.astype(int)).max()
        assert off == 0 or one.lanes != 8
        assert off <= 1

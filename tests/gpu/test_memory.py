"""A GPU whose memory runs out for real."""

import pytest
import torch

from sdbatch.engine.engine import Engine
from sdbatch.engine.request import Request
from sdbatch.models.build import Build
from sdbatch.models.sd1.family import StableDiffusion1
from tests.models.load import MOST_COUNTS, load

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")


@pytest.fixture
def capped():
    """Limit this process's share of the GPU's memory, in bytes; restore it at the end."""
    total = torch.cuda.get_device_properties(0).total_memory

    def cap(most):
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(most / total)

    yield cap
    torch.cuda.set_per_process_memory_fraction(1.0)


def test_lanes_are_halved_until_they_fit(tiny_model, capped):
    model = load(tiny_model, Build("cuda", "float32"))
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
    small = Engine(StableDiffusion1(model), lanes=8, threads=1)
    torch.cuda.reset_peak_memory_stats()
    expected = [small.submit(request).result() for request in requests]
    small.close()
    capped(int(2.5 * torch.cuda.max_memory_reserved()))
    large = Engine(StableDiffusion1(model), lanes=128, threads=1)
    drawn = [future.result() for future in [large.submit(request) for request in requests]]
    large.close()
    assert {one.lanes for one in drawn} <= {8, 16, 32, 64}
    assert large.usage.shrunk
    for one, other in zip(drawn, expected, strict=True):
        off = abs(one.image.astype(int) - other.image.astype(int)).max()
        assert off == 0 or one.lanes != 8
        assert off <= MOST_COUNTS

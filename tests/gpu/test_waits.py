"""What tests/engine/test_waits.py shows on a pretend device, by CUDA's own account."""

import pytest
import torch

from sdbatch.engine.engine import Engine
from sdbatch.models.build import Build
from sdbatch.models.sd1.family import StableDiffusion1
from sdbatch.samplers import SAMPLERS
from tests.engine.faulty_family import FaultyFamily
from tests.models.load import load
from tests.sd1 import build_request

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")


def test_cuda_reports_no_synchronising_call_in_any_samplers_ticks(tiny_model):
    family = FaultyFamily(StableDiffusion1(load(tiny_model, Build("cuda", "float16"))))
    requests = [build_request(sampler=name, num_inference_steps=3) for name in SAMPLERS]
    requests += [build_request(sampler=name, eta=0.5) for name in ("ddim", "tcd")]
    engine = Engine(family, lanes=2 * len(requests), threads=1)
    engine.submit(build_request()).result()  # cuBLAS and cuDNN set themselves up
    torch.cuda.set_sync_debug_mode("error")
    try:
        for future in [engine.submit(request) for request in requests]:
            future.result()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        engine.close()

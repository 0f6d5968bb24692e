"""The UNet as CUDA graphs: the same bits as without, whatever came before."""

import numpy as np
import pytest
import torch

from sdbatch.models.build import Build
from sdbatch.models.sd1.family import StableDiffusion1
from sdbatch.models.sd1.graphs import MOST_GRAPHS
from tests.models.load import draw, load
from tests.sd1 import build_request

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")


def built(folder, *names):
    return load(folder, Build("cuda", "float16", channels_last=True, rewrites=names))


def test_graphs_draw_the_same_bits_as_launches(tiny_model):
    requests = [
        build_request(seed=i, guidance_scale=(1.0, 6.0)[i % 2], height=(64, 96)[i % 3 == 0])
        for i in range(8)
    ]
    plain, graphed = (draw(built(tiny_model, *names), requests) for names in ((), ("graphs",)))
    for one, other in zip(plain, graphed, strict=True):
        assert np.array_equal(one.image, other.image)


@torch.inference_mode()
def test_an_answer_keeps_its_values_after_the_next_one(tiny_model):
    family = StableDiffusion1(built(tiny_model, "graphs"))
    readings = [family.read(build_request())] * 2
    conditions, _ = family.embed(readings, [])
    times = torch.full((2,), 500.0, device="cuda")
    first = family.denoise(torch.ones(2, 4, 8, 8, device="cuda"), times, conditions)
    copy = first.clone()
    family.denoise(torch.zeros(2, 4, 8, 8, device="cuda"), times, conditions)
    assert torch.equal(first, copy)


def test_only_the_last_shapes_are_kept(tiny_model):
    model = built(tiny_model, "graphs")
    sizes = [64 + 8 * i for i in range(MOST_GRAPHS + 2)]
    draw(model, [build_request(height=size, num_inference_steps=2) for size in sizes])
    assert len(model.unet._graphs) == MOST_GRAPHS

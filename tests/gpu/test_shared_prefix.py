"""The shared prefix on a GPU: the same bits for every row, whatever its neighbours."""

import numpy as np
import pytest
import torch

from sdbatch.engine import bits
from sdbatch.models.build import Build
from tests.models.load import draw, load
from tests.sd1 import build_request

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")


@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
def test_the_bits_of_a_row_do_not_depend_on_its_neighbours(tiny_model, channels_last):
    bits.pin_bits("cuda")
    build = Build("cuda", "float16", channels_last=channels_last, rewrites=("shared_prefix",))
    model = load(tiny_model, build)
    requests = [build_request(seed=i, guidance_scale=(1.0, 6.0)[i % 2]) for i in range(8)]
    for one, alone in zip(draw(model, requests[::-1])[::-1], requests, strict=True):
        assert np.array_equal(one.image, draw(model, [alone])[0].image)

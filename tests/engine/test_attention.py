"""The kernel of attention that a job names."""

import pytest
import torch
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends

from sdbatch.engine.attention import attention_by

KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_is_tried_first_in_the_block_and_not_after_it(name):
    before = _cur_sdpa_kernel_backends(with_priority=True)
    with attention_by(name):
        inside = _cur_sdpa_kernel_backends(with_priority=True)
    assert inside[0] == KERNELS[name]
    assert SDPBackend.MATH in inside  # any shape can be computed
    assert _cur_sdpa_kernel_backends(with_priority=True) == before


def test_torch_chooses_as_before():
    before = _cur_sdpa_kernel_backends(with_priority=True)
    with attention_by("torch"):
        assert _cur_sdpa_kernel_backends(with_priority=True) == before


def test_a_kernel_that_cannot_compute_a_shape_leaves_it_to_another():
    rows = torch.ones(1, 1, 4, 8)
    with attention_by("cudnn"):
        assert torch.nn.functional.scaled_dot_product_attention(rows, rows, rows).shape == (
            rows.shape
        )

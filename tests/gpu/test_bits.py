"""Bits on a GPU: what is pinned, float32 in float32, and the facts of the device."""

import pytest
import torch

from sdbatch.engine.bits import pin_bits
from sdbatch.engine.cuda import check_headroom, check_usable
from sdbatch.engine.device import device_facts

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")


@pytest.fixture(autouse=True)
def pinned():
    """Pin what a library may have changed before."""
    torch.backends.cudnn.benchmark = True
    pin_bits("cuda")


def test_nothing_is_tuned_on_a_gpu_and_float32_is_float32():
    assert not torch.backends.cudnn.benchmark
    assert torch.backends.cudnn.deterministic
    assert not torch.cuda.tunable.is_enabled()
    assert torch.backends.cudnn.allow_tf32 is False
    assert torch.backends.cuda.matmul.allow_tf32 is False


@pytest.mark.parametrize("operation", ["convolution", "product"])
def test_float32_is_computed_in_float32_on_a_gpu(operation):
    """Within 1e-6 of the sum of absolute products; TF32, rounded by hand, is off by 1e-4."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(2, 64, 32, 32, generator=generator)
    b = torch.randn(64, 64, 3, 3, generator=generator)

    def compute(left, right):
        if operation == "convolution":
            return torch.nn.functional.conv2d(left, right, padding=1)
        return left.flatten(2).transpose(1, 2) @ right.flatten(1)

    exact = compute(a.double(), b.double())
    size = compute(a.double().abs(), b.double().abs())
    off = (compute(a.cuda(), b.cuda()).cpu().double() - exact).abs() / size
    assert float(off.max()) < 1e-6


def test_facts_of_a_gpu_have_every_key():
    facts = device_facts("cuda")
    keys = {"kind", "name", "multiprocessors", "capability", "memory", "cuda", "cudnn"}
    assert facts.keys() == {*keys, "libraries", "driver", "instructions", "environment"}
    assert facts["name"] == torch.cuda.get_device_name()
    assert facts["multiprocessors"] > 0
    assert facts["memory"] > 2**30
    assert facts["cudnn"] == torch.backends.cudnn.version()
    assert facts["cuda"] == torch.version.cuda


def test_a_gpu_that_torch_can_use_raises_nothing():
    check_usable()


def test_an_empty_gpu_has_headroom(caplog):
    torch.cuda.reset_peak_memory_stats()
    check_headroom(torch.device("cuda"))
    assert caplog.records == []

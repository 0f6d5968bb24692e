"""Linear layers in 8 bits: which they are, and what stops them. tests/gpu draws with them."""

import sys

import pytest
import torch

from sdbatch.errors import ModelError
from sdbatch.models import fp8_linears

GPU = torch.device("cuda", 0)


def test_layers_whose_sides_are_multiples_of_16_are_chosen():
    model = torch.nn.Sequential(
        torch.nn.Linear(16, 32),
        torch.nn.Linear(16, 24),
        torch.nn.Linear(24, 16),
        torch.nn.Conv2d(16, 16, 3),
        torch.nn.Sequential(torch.nn.Linear(48, 16)),
    )
    assert [name for name, _ in fp8_linears.chosen(model)] == ["0", "4.0"]


def test_most_linear_layers_of_a_unet_are_chosen(model):
    linears = [m for m in model.unet.modules() if isinstance(m, torch.nn.Linear)]
    names = [name for name, _ in fp8_linears.chosen(model.unet)]
    assert len(names) == len(linears)
    assert any(name.endswith("attn2.to_k") for name in names)


def test_torchao_that_is_missing_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ModelError, match=r'torchao is not installed. pip install "sdbatch\[fp8\]"'):
        fp8_linears.quantize(torch.nn.Linear(16, 16))


@pytest.mark.parametrize(
    ("capability", "allowed"), [((8, 6), False), ((8, 9), True), ((9, 0), True)]
)
def test_an_older_gpu_is_refused_in_one_line(monkeypatch, capability, allowed):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A10G")
    if allowed:
        fp8_linears.check_device(GPU)
        return
    with pytest.raises(
        ModelError,
        match=r"^engine.fp8_linears = True: NVIDIA A10G has .* 8.6: must be at least 8.9",
    ):
        fp8_linears.check_device(GPU)


def test_another_device_is_refused_in_one_line():
    with pytest.raises(ModelError, match=r"^engine.fp8_linears = True: is for GPUs, not for cpu"):
        fp8_linears.check_device(torch.device("cpu"))

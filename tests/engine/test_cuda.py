"""How many lanes a device has, where that goes by its type."""

import pytest

from sdbatch.engine import cuda
from sdbatch.errors import ModelError

LANES = {"H100": 64, "A10G": 32, "L4": 16, "RTX-PRO-6000": 48}


@pytest.mark.parametrize(
    ("name", "lanes"),
    [
        ("NVIDIA H100 80GB HBM3", 64),
        ("NVIDIA A10G", 32),
        ("NVIDIA L4", 16),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 48),
    ],
)
def test_lanes_go_by_the_type_in_the_devices_name(name, lanes):
    assert cuda.lanes(LANES, name) == lanes


@pytest.mark.parametrize("name", ["NVIDIA L40S", "Tesla T4", "NVIDIA A100-SXM4-80GB", "cpu"])
def test_a_type_without_lanes_is_an_error_with_its_name(name):
    words = rf"engine.lanes = H100, .* an actor has {name}. .*label_sel"
    with pytest.raises(ModelError, match=words):
        cuda.lanes(LANES, name)


def test_a_cpu_is_called_so():
    assert cuda.name("cpu") == "cpu"

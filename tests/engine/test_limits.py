"""The lanes for a size, by the limits of a family."""

import pytest

from sdbatch.engine.limits import Capacity, ModelLimits
from sdbatch.models.sd1 import LIMITS
from tests import flow_family


@pytest.mark.parametrize(
    ("device", "height", "width", "lanes"),
    [
        ("cpu", 64, 64, 32),
        ("cpu", 8, 8, 32),
        ("cpu", 128, 128, 16),
        ("cpu", 256, 256, 4),
        ("cpu", 512, 512, 2),
        ("cpu", 2048, 2048, 2),
        ("cuda", 8, 8, 512),
        ("cuda", 64, 64, 512),
        ("cuda", 256, 256, 128),
        ("cuda", 512, 512, 32),
        ("cuda", 512, 768, 16),
        ("cuda", 1024, 1024, 8),
        ("cuda", 4096, 4096, 2),
    ],
)
def test_lanes_are_a_power_of_two_that_falls_with_the_images_size(device, height, width, lanes):
    assert LIMITS.lanes(device, height, width) == lanes


def test_lanes_follow_from_the_familys_own_limits():
    few = ModelLimits(multiple_of=8, side=1024, capacity={"cuda": Capacity(lanes=8, most=16)})
    found = [few.lanes("cuda", side, side) for side in (256, 1024, 2048, 4096)]
    assert found == [16, 8, 2, 2]
    assert flow_family.LIMITS.lanes("cpu", 64, 64) == 8


@pytest.mark.parametrize(
    ("gib", "side", "group", "lanes"),
    [
        (141, 512, 4, 32),
        (8, 512, 4, 32),
        (6, 512, 4, 16),
        (4, 512, 4, 2),
        (6, 512, 1, 32),
        (8, 1024, 4, 2),
        (16, 1024, 4, 8),
        (4, 64, 4, 512),
    ],
)
def test_memory_that_does_not_hold_the_lanes_of_a_gpu_has_fewer(gib, side, group, lanes):
    assert LIMITS.lanes("cuda", side, side, gib * 2**30, group) == lanes


def test_the_memory_of_a_gpu_does_not_count_on_a_cpu():
    assert LIMITS.lanes("cpu", 64, 64, 2**30, 4) == 32

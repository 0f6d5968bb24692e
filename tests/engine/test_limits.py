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
        ("cuda", 64, 64, 64),
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

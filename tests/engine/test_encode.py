"""Pictures are encoded in groups of one size, before their requests wait for lanes."""

import numpy as np
import pytest
import torch

from sdbatch.engine import encode
from sdbatch.engine.clock import DeviceClock
from sdbatch.engine.cohort import Ticket
from sdbatch.engine.encode import Encoder
from sdbatch.engine.faults import FaultPolicy
from sdbatch.engine.limits import CallSizes
from sdbatch.engine.request import Usage


@pytest.fixture
def encoder_of(kind, family):
    """Return an encoder with groups of two pictures, and the heights of what it has encoded."""
    if not kind.draws_from_pictures:
        pytest.skip("the family draws from no pictures")
    ready = []
    faults = FaultPolicy(Usage(), lambda error: None)
    sizes = CallSizes(lanes=4, pixels=None, least=2)
    return Encoder(family, faults, DeviceClock(None), sizes, ready.append), ready


@torch.inference_mode()
def order_of(encoder_of, family, request_for, heights):
    """Encode pictures of these heights; return them in the order in which they were encoded."""
    encoder, ready = encoder_of
    for height in heights:
        inputs = {"image": np.zeros((height, 16, 3), np.uint8)}
        request = request_for(height=height, width=16, inputs=inputs)
        encoder.add(Ticket(request, family.read(request)))
    while encoder.busy:
        assert encoder.encode(lambda account: True)
    return [ticket.request.height for ticket in ready]


def test_full_groups_are_encoded_first(encoder_of, family, request_for):
    order = order_of(encoder_of, family, request_for, [16, 24, 24])
    assert order == [24, 24, 16]


def test_a_size_does_not_wait_without_end_for_the_groups_of_another(
    encoder_of, family, request_for, monkeypatch
):
    monkeypatch.setattr(encode, "MOST_PASSED", 1)
    order = order_of(encoder_of, family, request_for, [*[16] * 10, 24])
    assert order == [16, 16, 16, 16, 24, *[16] * 6]

"""What the engine asks of a family: its limits, its keys, its inputs, its conditions."""

import numpy as np
import pytest

from sdbatch.engine.limits import Capacity, ModelLimits
from sdbatch.models.sd1 import LIMITS
from tests import flow_family

PICTURE = np.full((64, 64, 3), 200, np.uint8)


def test_a_size_that_the_family_cannot_draw_is_the_requests_error(
    new_engine, request_for, replaceable, family
):
    replaceable.limits = ModelLimits(multiple_of=16, side=64, capacity=family.limits.capacity)
    engine = new_engine()
    with pytest.raises(ValueError, match="width = 72: must be a multiple of 16 for this model"):
        engine.submit(request_for(width=72)).result()
    assert engine.submit(request_for(width=80)).result().image.shape == (64, 80, 3)


def test_a_key_that_the_family_does_not_use_is_the_requests_error(
    new_engine, request_for, replaceable, family
):
    replaceable.keys = family.keys - {"negative_prompt"}
    engine = new_engine()
    with pytest.raises(ValueError, match="negative_prompt = 'blurry': must be ''"):
        engine.submit(request_for(negative_prompt="blurry")).result()
    with pytest.raises(ValueError, match="negative_prompt = 'blurry': must be ''"):
        engine.check(request_for(negative_prompt="blurry"))
    engine.check(request_for())


def test_inputs_of_a_request_reach_its_family_and_no_neighbour(engine, request_for, kind):
    if kind.name != "flow":
        pytest.skip("Stable Diffusion 1.x has no inputs yet")
    plain = engine.submit(request_for()).result().image
    requests = [request_for(), request_for(inputs={"image": PICTURE}), request_for()]
    drawn = [future.result().image for future in [engine.submit(each) for each in requests]]
    assert np.array_equal(drawn[0], plain)
    assert np.array_equal(drawn[2], plain)
    assert (drawn[1] != plain).any()
    wrong = engine.submit(request_for(inputs={"image": PICTURE[:8]}))
    with pytest.raises(ValueError, match=r"image = .*: must have the image's height and width"):
        wrong.result()


def test_the_denoiser_gets_every_condition_for_every_lane(
    new_engine, request_for, replaceable, family, kind
):
    shapes = []

    def denoise(latents, timesteps, conditions):
        shapes.append({name: tensor.shape[0] for name, tensor in conditions.items()})
        assert timesteps.shape == (len(latents),)
        return family.denoise(latents, timesteps, conditions)

    replaceable.denoise = denoise
    new_engine(lanes=6).submit(request_for()).result()
    names = {"sd1": ("text",), "flow": ("text", "pooled")}[kind.name]
    assert shapes == [dict.fromkeys(names, 6)] * 6


@pytest.mark.parametrize(
    ("device", "height", "width", "lanes"),
    [
        ("cpu", 64, 64, 16),
        ("cpu", 8, 8, 16),
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

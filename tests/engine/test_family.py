"""What the engine asks of a family: its limits, its keys, its inputs, its conditions."""

import numpy as np
import pytest

from sdbatch.engine.limits import ModelLimits

PICTURE = np.full((64, 64, 3), 200, np.uint8)


def test_a_size_that_the_family_cannot_draw_is_the_requests_error(
    new_engine, request_for, faulty, family
):
    faulty.limits = ModelLimits(multiple_of=16, side=64, capacity=family.limits.capacity)
    engine = new_engine()
    with pytest.raises(ValueError, match="width = 72: must be a multiple of 16 for this model"):
        engine.submit(request_for(width=72)).result()
    assert engine.submit(request_for(width=80)).result().image.shape == (64, 80, 3)


def test_a_key_that_the_family_does_not_use_is_the_requests_error(
    new_engine, request_for, faulty, family
):
    faulty.keys = family.keys - {"negative_prompt"}
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
    new_engine, request_for, faulty, family, kind
):
    shapes = []

    def keep_shapes(latents, timesteps, conditions):
        shapes.append({name: tensor.shape[0] for name, tensor in conditions.items()})
        assert timesteps.shape == (len(latents),)

    faulty.on_denoise = keep_shapes
    new_engine(lanes=6).submit(request_for()).result()
    names = {"sd1": ("text",), "flow": ("text", "pooled")}[kind.name]
    assert shapes == [dict.fromkeys(names, 6)] * 6

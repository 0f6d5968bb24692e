"""The engine with a real model: lanes by size, a callback that raises, memory after a failure."""

import torch

from sdbatch.engine.engine import Engine
from sdbatch.models.sd1.family import StableDiffusion1


def test_larger_images_get_fewer_lanes_by_their_area_alone(model, request_for):
    engine = Engine(StableDiffusion1(model), lanes=16, threads=1, pixels=64 * 64)
    sizes = {(64, 64): 16, (16, 16): 16, (64, 128): 8, (128, 128): 4, (256, 256): 2}
    for (height, width), lanes in sizes.items():
        request = request_for(height=height, width=width, num_inference_steps=1)
        assert engine.submit(request).result().lanes == lanes
    engine.close()


def test_a_callback_that_raises_ends_no_other_request(new_engine, request_for, capfd):
    engine = new_engine(lanes=4)

    def raises(_):
        raise KeyboardInterrupt("of a callback")

    futures = [engine.submit(request_for(seed=seed)) for seed in range(6)]
    futures[0].add_done_callback(raises)
    assert [future.result(timeout=30).lanes for future in futures] == [4] * 6
    engine.close()
    assert "of a callback" in capfd.readouterr().err


def test_a_failed_request_keeps_no_tensors_of_the_call_that_failed(
    new_engine, request_for, monkeypatch
):
    engine = new_engine(lanes=2)

    def full(*_):
        raise torch.OutOfMemoryError("tried to allocate 20 GiB")

    monkeypatch.setattr(engine._family, "denoise", full)
    error = engine.submit(request_for()).exception()
    engine.close()
    frames = []
    trace = error.__traceback__
    while trace is not None:
        frames.append(trace.tb_frame.f_code.co_name)
        trace = trace.tb_next
    assert "tick" not in frames

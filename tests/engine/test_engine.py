"""The engine's promises: a row's pixels are its own, no request is lost, faults stay put."""

import random
import threading

import numpy as np
import pytest
import torch

from sdbatch.engine.engine import Engine
from sdbatch.engine.samplers import SAMPLERS
from sdbatch.errors import ModelError


def mixed(request_for, count: int):
    """Requests of many kinds: all samplers, guided and not, several steps, prompts and sizes."""
    samplers = list(SAMPLERS)
    return [
        request_for(
            prompt=f"a dog, number {i % 4} " * (1 + i % 3),
            negative_prompt="blurry" if i % 2 else "",
            seed=i,
            sampler=samplers[i % len(samplers)],
            num_inference_steps=(5, 8)[i // len(samplers) % 2],
            guidance_scale=(1.0, 7.5, 3.0)[i % 3],
            height=(64, 64, 72)[i % 3],
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pixels_are_a_function_of_the_row_whatever_is_drawn_beside_it(
    tiny_model, request_for, dtype
):
    from sdbatch.engine import checkpoint, loading

    files = checkpoint.find(str(tiny_model), None, "")
    engine = Engine(loading.load(files, "cpu", dtype), lanes=6, threads=1)
    requests = mixed(request_for, 40)
    alone = [engine.submit(request).result().image for request in requests]
    for seed in range(3):
        order = random.Random(seed).sample(range(len(requests)), len(requests))
        futures = {i: engine.submit(requests[i]) for i in order}
        for i, future in futures.items():
            assert np.array_equal(future.result().image, alone[i]), requests[i]
    engine.close()


def test_requests_of_a_kind_share_a_batch(model, request_for):
    engine = Engine(model, lanes=8, threads=1)
    gate = threading.Event()
    first = engine.submit(request_for(num_inference_steps=3))
    first.add_done_callback(lambda _: gate.wait())  # holds the engine while the others queue up
    futures = [engine.submit(request_for(seed=seed)) for seed in range(8)]
    gate.set()
    [future.result() for future in futures]
    engine.close()
    assert engine.ticks == 3 + 2 * 6  # 8 guided requests of 6 steps in 8 lanes: two batches


def test_prompt_tokens_are_counted_and_truncation_is_told(engine, request_for):
    short = engine.submit(request_for(prompt="abc")).result()
    long = engine.submit(request_for(prompt="x" * 20_000)).result()
    negative = engine.submit(request_for(negative_prompt="x" * 100)).result()
    unused = engine.submit(request_for(negative_prompt="x" * 100, guidance_scale=1.0)).result()
    assert (short.prompt_tokens, short.prompt_truncated) == (3, False)
    assert (long.prompt_tokens, long.prompt_truncated) == (20_000, True)
    assert (negative.prompt_truncated, unused.prompt_truncated) == (True, False)


def test_text_after_the_77th_token_changes_nothing(engine, request_for):
    one, two = (engine.submit(request_for(prompt="x" * 75 + end)).result() for end in ("y", "z"))
    assert np.array_equal(one.image, two.image)


def test_a_request_that_fails_leaves_those_beside_it_alone(engine, request_for):
    bad = request_for(sampler="lcm", num_inference_steps=900)  # more than the sampler can
    good = request_for(sampler="lcm", num_inference_steps=4)
    futures = [engine.submit(request) for request in (bad, good, bad)]
    with pytest.raises(ValueError, match="900"):
        futures[0].result()
    assert futures[1].result().image.shape == (64, 64, 3)


def test_one_of_a_batch_that_fails_is_found_by_drawing_each_alone(model, request_for, monkeypatch):
    engine = Engine(model, lanes=8, threads=1)
    original = engine._images

    def fails_with_seed_2(requests):
        if any(request.seed == 2 for request in requests):
            raise ValueError("seed 2 is bad")
        return original(requests)

    monkeypatch.setattr(engine, "_images", fails_with_seed_2)
    futures = [engine.submit(request_for(seed=seed)) for seed in range(4)]
    assert [future.exception() is None for future in futures] == [True, True, False, True]
    engine.close()


def test_latents_that_are_not_finite_are_a_failed_row(model, request_for, monkeypatch):
    engine = Engine(model, lanes=4, threads=1)
    monkeypatch.setattr(
        "sdbatch.engine.cohort.Cohort.advance",
        lambda self, noise: (
            self.latents.fill_(float("nan")),
            setattr(self, "_step", self._step + 1),
        ),
    )
    with pytest.raises(ArithmeticError, match="not finite"):
        engine.submit(request_for()).result()
    engine.close()


def test_out_of_memory_stops_the_engine_and_loses_no_future(model, request_for, monkeypatch):
    engine = Engine(model, lanes=4, threads=1)

    def out_of_memory(requests):
        raise torch.OutOfMemoryError("tried to allocate 20 GiB")

    monkeypatch.setattr(engine, "_images", out_of_memory)
    futures = [engine.submit(request_for(seed=seed)) for seed in range(9)]
    for future in futures:
        with pytest.raises(ModelError, match=r"engine.lanes = 4: out of memory .* Set fewer lanes"):
            future.result()
    with pytest.raises(ModelError, match="out of memory"):
        engine.submit(request_for())


def test_close_draws_what_waits(model, request_for):
    engine = Engine(model, lanes=4, threads=1)
    futures = [engine.submit(request_for(seed=seed)) for seed in range(5)]
    engine.close()
    assert all(future.done() and future.exception() is None for future in futures)


def test_a_request_cancelled_in_time_is_not_drawn(model, request_for):
    engine = Engine(model, lanes=2, threads=1)
    futures = [engine.submit(request_for(seed=seed)) for seed in range(4)]
    cancelled = futures[3].cancel()
    engine.close()
    assert cancelled
    assert [future.cancelled() for future in futures] == [False, False, False, True]


def test_submit_may_be_called_from_many_threads(engine, request_for):
    alone = [engine.submit(request_for(seed=seed)).result().image for seed in range(8)]
    found = {}

    def submit(seed):
        found[seed] = engine.submit(request_for(seed=seed)).result().image

    threads = [threading.Thread(target=submit, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(found[seed], alone[seed]) for seed in range(8))

"""Denoiser calls that reuse what an earlier one computed: aligned by each row's own steps."""

import numpy as np
import pytest
import torch


def whole_calls(faulty):
    """Return the numbers of the denoiser calls that computed everything."""
    return [number for number, whole in enumerate(faulty.whole) if whole]


def test_every_nth_call_of_a_row_is_whole_and_the_others_reuse_it(new_engine, request_for, faulty):
    engine = new_engine()
    images = {}
    for interval in (1, 2, 3):
        faulty.whole.clear()
        request = request_for(num_inference_steps=7, cache_interval=interval)
        images[interval] = engine.submit(request).result().image
        assert whole_calls(faulty) == list(range(0, 7, interval))
    assert (images[1] != images[2]).any()
    assert (images[2] != images[3]).any()


def test_a_request_joins_before_the_next_whole_call_of_those_that_are_drawn(
    new_engine, request_for, faulty, held
):
    engine = new_engine(lanes=8)
    values = {"num_inference_steps": 6, "cache_interval": 3}
    futures = [engine.submit(request_for(seed=0, **values))]
    held.wait()  # in its first tick, alone
    futures += [engine.submit(request_for(seed=1, **values))]
    held.release()
    images = [future.result().image for future in futures]
    assert engine.usage.ticks == 3 + 6
    assert whole_calls(faulty) == [0, 3, 6]
    for seed, image in enumerate(images):
        alone = engine.submit(request_for(seed=seed, **values)).result().image
        assert np.array_equal(image, alone)


def test_requests_of_other_intervals_have_lanes_of_their_own(new_engine, request_for, faulty, held):
    engine = new_engine(lanes=8)
    futures = [engine.submit(request_for(seed=9, num_inference_steps=1))]
    held.wait()
    requests = [
        request_for(seed=interval, num_inference_steps=steps, cache_interval=interval)
        for interval in (1, 2, 3)
        for steps in (4, 5)
    ]
    futures += [engine.submit(request) for request in requests]
    held.release()
    images = [future.result().image for future in futures[1:]]
    assert engine.usage.ticks == 1 + 5 + 5 + 5
    for request, image in zip(requests, images, strict=True):
        assert np.array_equal(engine.submit(request).result().image, image)


def test_a_row_that_ends_between_whole_calls_leaves_the_others_their_bits(new_engine, request_for):
    engine = new_engine(lanes=8)
    requests = [
        request_for(seed=steps, num_inference_steps=steps, cache_interval=3, guidance_scale=scale)
        for steps, scale in ((4, 5.0), (8, 1.0), (7, 3.0))
    ]
    together = [future.result() for future in [engine.submit(request) for request in requests]]
    for request, drawn in zip(requests, together, strict=True):
        assert np.array_equal(engine.submit(request).result().image, drawn.image)


def test_cancelled_requests_release_their_lanes_before_a_whole_call(
    new_engine, request_for, faulty, held
):
    engine = new_engine(lanes=4)
    values = {"num_inference_steps": 12, "cache_interval": 4}
    futures = [engine.submit(request_for(seed=seed, **values)) for seed in range(3)]
    held.wait()
    assert futures[0].cancel()
    held.release()
    others = [future.result().image for future in futures[1:]]
    # admitted with one whose cancellation came after, the third waits for four ticks and no more
    assert engine.usage.ticks <= 4 + 12
    assert all(number % 4 == 0 for number in whole_calls(faulty))
    for seed, image in enumerate(others, start=1):
        alone = engine.submit(request_for(seed=seed, **values)).result().image
        assert np.array_equal(alone, image)


def test_guidance_begins_and_ends_at_whole_calls(new_engine, request_for):
    engine = new_engine(lanes=2)
    values = {"num_inference_steps": 10, "guidance_start": 0.2, "guidance_stop": 0.7}
    engine.submit(request_for(**values, cache_interval=4)).result()
    assert engine.usage.filled == 10 + 4  # guided from tick 4 to 8, where it would be from 2 to 7


def test_the_guidance_of_a_neighbour_that_begins_and_ends_changes_no_bit(new_engine, request_for):
    engine = new_engine(lanes=8)
    windows = [(0.0, 1.0), (0.4, 0.8), (0.0, 0.5), (0.7, 1.0)]
    requests = [
        request_for(
            seed=seed,
            num_inference_steps=9,
            cache_interval=2,
            guidance_start=start,
            guidance_stop=stop,
        )
        for seed, (start, stop) in enumerate(windows)
    ]
    together = [future.result() for future in [engine.submit(request) for request in requests]]
    for request, drawn in zip(requests, together, strict=True):
        assert np.array_equal(engine.submit(request).result().image, drawn.image)


def test_out_of_memory_in_a_call_that_reuses_begins_the_rows_again(new_engine, request_for, faulty):
    few = new_engine(lanes=4)
    requests = [request_for(seed=seed, cache_interval=3) for seed in range(3)]
    expected = [few.submit(request).result().image for request in requests]
    engine = new_engine(lanes=8)
    faulty.whole.clear()

    def fail_in_the_second_call(latents, *_):
        if len(latents) == 8 and len(faulty.whole) == 1:
            raise torch.OutOfMemoryError("tried to allocate 20 GiB")

    faulty.on_denoise = fail_in_the_second_call
    futures = [engine.submit(request) for request in requests]
    for future, image in zip(futures, expected, strict=True):
        assert np.array_equal(future.result().image, image)
    assert faulty.whole[:5] == [True, True, False, False, True]


@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_cohort_that_fails_leaves_the_others_what_they_reuse(
    new_engine, request_for, faulty, call
):
    engine = new_engine(lanes=8)
    bad = request_for(seed=2, num_inference_steps=5, cache_interval=3)
    good = request_for(seed=1, num_inference_steps=6, cache_interval=3)
    expected = engine.submit(good).result().image
    steps = 0

    def fail(requests, _):
        nonlocal steps
        if requests == [bad]:
            steps += 1
            if steps == call:
                raise ValueError("seed 2 is bad")

    faulty.on_step = fail
    futures = [engine.submit(request) for request in (good, bad)]
    with pytest.raises(ValueError, match="seed 2 is bad"):
        futures[1].result()
    assert np.array_equal(futures[0].result().image, expected)


def test_a_small_batch_shrinks_between_whole_calls_too(new_engine, request_for, held):
    engine = new_engine(lanes=8)
    first = engine.submit(request_for(num_inference_steps=1, cache_interval=3), exact=False)
    held.wait()
    requests = [
        request_for(seed=steps, num_inference_steps=steps, cache_interval=3) for steps in (4, 6)
    ]
    futures = [engine.submit(request, exact=False) for request in requests]
    held.release()
    first.result()
    quick = [future.result() for future in futures]
    for request, drawn in zip(requests, quick, strict=True):
        exact = engine.submit(request).result()
        assert (drawn.exact, drawn.lanes) == (False, 2 if request.seed == 6 else 4)
        assert np.abs(drawn.image.astype(int) - exact.image).max() <= 1

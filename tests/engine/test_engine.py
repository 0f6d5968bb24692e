"""The engine: lanes are shared and freed, no request is lost, faults stay where they belong."""

import threading
import time

import numpy as np
import pytest
import torch

from sdbatch.engine.cohort import Cohort
from sdbatch.engine.engine import TURN
from sdbatch.errors import ModelError


def test_guided_takes_two_lanes_and_unguided_one(new_engine, request_for, held):
    engine = new_engine(lanes=8)
    futures = [engine.submit(request_for(seed=0, num_inference_steps=3))]
    time.sleep(0.1)  # it stands in the first tick, alone
    futures += [engine.submit(request_for(seed=i)) for i in range(3)]
    futures += [engine.submit(request_for(seed=i, guidance_scale=1.0)) for i in range(2)]
    held.set()
    [future.result() for future in futures]
    # the three guided ones fill the lanes beside the first; the two unguided ones follow it
    assert engine.usage.ticks == 3 + 6
    assert engine.usage.filled == 3 * 2 + 3 * 6 * 2 + 2 * 6


def test_requests_that_differ_in_all_but_size_share_the_ticks(new_engine, request_for, held, kind):
    engine = new_engine(lanes=16)
    futures = [engine.submit(request_for(num_inference_steps=2, guidance_scale=1.0))]
    time.sleep(0.1)
    several = ["ddim", "euler_a", "dpmpp_2m_karras", "lcm"]
    samplers = several if set(several) <= set(kind.samplers) else list(kind.samplers) * 4
    futures += [
        engine.submit(request_for(sampler=sampler, num_inference_steps=4 + i, seed=i))
        for i, sampler in enumerate(samplers)
    ]
    held.set()
    [future.result() for future in futures]
    assert engine.usage.ticks == 1 + 7  # as many as the longest needs, after the one alone
    assert engine.usage.filled == 2 + 2 * (4 + 5 + 6 + 7)


def test_an_image_takes_one_lane_outside_its_guidance_interval(new_engine, request_for):
    engine = new_engine(lanes=2)
    whole = engine.submit(request_for(num_inference_steps=10)).result()
    assert engine.usage.filled == 20
    part = engine.submit(
        request_for(num_inference_steps=10, guidance_start=0.2, guidance_stop=0.7)
    ).result()
    assert engine.usage.filled == 20 + 10 + 5
    assert (part.image != whole.image).any()


def test_an_empty_guidance_interval_is_no_guidance(new_engine, request_for):
    engine = new_engine()
    one = engine.submit(request_for(guidance_start=0.5, guidance_stop=0.5)).result()
    two = engine.submit(request_for(guidance_scale=1.0)).result()
    assert np.array_equal(one.image, two.image)


def test_lanes_that_an_interval_leaves_free_are_used_and_given_back_in_time(
    new_engine, request_for, held
):
    engine = new_engine(lanes=2)
    first = engine.submit(request_for(num_inference_steps=20, guidance_start=0.5))
    time.sleep(0.1)
    fits = engine.submit(request_for(num_inference_steps=8, guidance_scale=1.0))
    waits = engine.submit(request_for(num_inference_steps=12, guidance_scale=1.0))
    held.set()
    [future.result() for future in (first, fits, waits)]
    # the second runs beside the first's unguided half; the third, too long for that, after it
    assert engine.usage.ticks == 20 + 12


def test_no_request_waits_for_ever_while_longer_ones_keep_coming(new_engine, request_for):
    engine = new_engine(lanes=2)
    long = [engine.submit(request_for(num_inference_steps=3, seed=i)) for i in range(2)]
    short = engine.submit(request_for(num_inference_steps=2))
    came = 0
    while not short.done():
        if long[came].done():
            came += 1
        while len(long) < came + 2:  # one is always waiting
            long.append(engine.submit(request_for(num_inference_steps=3, seed=len(long))))
        time.sleep(0.001)
    assert came < 100  # PATIENCE * lanes = 64 may overtake it, and no more


def test_sizes_take_turns(new_engine, request_for, held):
    engine = new_engine(lanes=2)
    ended = []
    sizes = [64] * 6 + [72]
    for i, height in enumerate(sizes):
        future = engine.submit(request_for(seed=i, height=height, num_inference_steps=20))
        future.add_done_callback(lambda _, height=height: ended.append(height))
    held.set()
    engine.close()
    assert sorted(ended) == sorted(sizes)
    assert ended.index(72) <= 1 + 2 * TURN // 20  # not last: the other size gave way


def test_prompt_tokens_are_counted_and_truncation_is_told(engine, request_for):
    short = engine.submit(request_for(prompt="abc")).result()
    long = engine.submit(request_for(prompt="x" * 20_000)).result()
    negative = engine.submit(request_for(negative_prompt="x" * 100)).result()
    unused = engine.submit(request_for(negative_prompt="x" * 100, guidance_scale=1.0)).result()
    assert (short.prompt_tokens, short.prompt_truncated) == (3, False)
    assert (long.prompt_tokens, long.prompt_truncated) == (20_000, True)
    assert (negative.prompt_truncated, unused.prompt_truncated) == (True, False)


def test_a_request_that_fails_does_not_affect_its_neighbours(engine, request_for, kind):
    sampler = "lcm" if "lcm" in kind.samplers else kind.samplers[0]
    bad = request_for(sampler=sampler, num_inference_steps=900)  # more than the sampler can
    good = request_for(sampler=sampler, num_inference_steps=4)
    futures = [engine.submit(request) for request in (bad, good, bad)]
    with pytest.raises(ValueError, match="900"):
        futures[0].result()
    assert futures[1].result().image.shape == (64, 64, 3)


@pytest.mark.parametrize("when", ["start", "advance"])
def test_one_of_a_cohort_that_fails_is_found_by_drawing_each_in_its_own(
    new_engine, request_for, monkeypatch, held, when
):
    name = "__init__" if when == "start" else "advance"
    original = getattr(Cohort, name)

    def fails_with_seed_2(self, *args):
        tickets = args[0] if when == "start" else self.tickets
        if any(ticket.request.seed == 2 for ticket in tickets):
            raise ValueError("seed 2 is bad")
        original(self, *args)

    engine = new_engine(lanes=8)
    first = engine.submit(request_for(seed=9))
    time.sleep(0.1)
    monkeypatch.setattr(Cohort, name, fails_with_seed_2)
    futures = [engine.submit(request_for(seed=seed)) for seed in range(4)]
    held.set()
    assert [future.exception() is None for future in futures] == [True, True, False, True]
    assert first.exception() is None


def test_latents_that_are_not_finite_are_a_failed_row_and_its_neighbours_are_not(
    engine, request_for, monkeypatch
):
    good = engine.submit(request_for(seed=1)).result().image
    original = Cohort.advance

    def breaks_seed_2(self, noise):
        original(self, noise)
        for i, ticket in enumerate(self.tickets):
            if ticket.request.seed == 2:
                self.latents[i] = float("nan")

    monkeypatch.setattr(Cohort, "advance", breaks_seed_2)
    futures = [engine.submit(request_for(seed=seed)) for seed in (1, 2, 1)]
    with pytest.raises(
        ArithmeticError, match="The latents are not finite: the model cannot draw these values"
    ):
        futures[1].result()
    assert np.array_equal(futures[0].result().image, good)
    assert np.array_equal(futures[2].result().image, good)


def test_a_broken_device_ends_the_engine_and_loses_no_future(new_engine, request_for, replaceable):
    engine = new_engine()
    submitted = threading.Event()

    def broken(*_):
        submitted.wait()
        raise torch.AcceleratorError("an illegal memory access was encountered")

    replaceable.denoise = broken
    futures = [engine.submit(request_for(seed=seed)) for seed in range(9)]
    submitted.set()
    for future in futures:
        with pytest.raises(ModelError, match=r"The device failed \(an illegal memory.*again"):
            future.result()
    with pytest.raises(ModelError, match=r"The device failed"):
        engine.submit(request_for())


def test_close_draws_what_waits(new_engine, request_for):
    engine = new_engine()
    futures = [engine.submit(request_for(seed=seed)) for seed in range(5)]
    engine.close()
    assert all(future.done() and future.exception() is None for future in futures)
    with pytest.raises(ModelError, match="The engine is closed and accepts no more requests"):
        engine.submit(request_for())


def test_close_can_cancel_what_waits_and_what_is_drawn(new_engine, request_for, held):
    engine = new_engine()
    futures = [engine.submit(request_for(seed=seed)) for seed in range(5)]
    time.sleep(0.1)
    threading.Timer(0.1, held.set).start()
    engine.close(cancel=True)
    assert all(future.cancelled() for future in futures)
    assert engine.usage.ticks <= 1


def test_a_cancelled_request_frees_its_lanes_and_changes_no_other(new_engine, request_for, held):
    engine = new_engine(lanes=4)
    steps = {"num_inference_steps": 30}
    futures = [engine.submit(request_for(seed=seed, **steps)) for seed in range(4)]
    time.sleep(0.1)
    assert futures[0].cancel()
    assert futures[3].cancel()
    held.set()
    others = [futures[1].result(), futures[2].result()]
    assert engine.usage.ticks <= 2 * 30 - 20  # the third did not wait for the end of the second
    alone = [engine.submit(request_for(seed=seed, **steps)).result() for seed in (1, 2)]
    for one, two in zip(others, alone, strict=True):
        assert np.array_equal(one.image, two.image)


def test_usage_counts_idle_time_and_padding(new_engine, request_for):
    engine = new_engine(lanes=4)
    assert engine.usage.ticks == engine.usage.seconds == 0
    engine.submit(request_for(num_inference_steps=5)).result()
    time.sleep(0.2)
    engine.submit(request_for(num_inference_steps=5)).result()
    usage = engine.usage
    assert (usage.ticks, usage.rows, usage.filled) == (10, 40, 20)
    assert 0.15 < usage.idle_seconds < usage.seconds

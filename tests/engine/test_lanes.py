"""Lanes are shared and freed; no request waits without end."""

from concurrent.futures import FIRST_COMPLETED, wait
from contextlib import closing

import numpy as np
import pytest
import torch

from sdbatch.engine.engine import Engine


def test_guided_takes_two_lanes_and_unguided_one(new_engine, request_for, held):
    engine = new_engine(lanes=8)
    futures = [engine.submit(request_for(seed=0, num_inference_steps=3))]
    held.wait()  # in its first tick, alone
    futures += [engine.submit(request_for(seed=i)) for i in range(3)]
    futures += [engine.submit(request_for(seed=i, guidance_scale=1.0)) for i in range(2)]
    held.release()
    [future.result() for future in futures]
    # the three guided ones fill the lanes next to the first; the two unguided ones follow it
    assert engine.usage.ticks == 3 + 6
    assert engine.usage.filled == 3 * 2 + 3 * 6 * 2 + 2 * 6


def test_requests_that_differ_in_all_but_size_share_the_ticks(new_engine, request_for, held, kind):
    engine = new_engine(lanes=16)
    futures = [engine.submit(request_for(num_inference_steps=2, guidance_scale=1.0))]
    held.wait()
    several = ["ddim", "euler_a", "dpmpp_2m_karras", "lcm"]
    samplers = several if set(several) <= set(kind.samplers) else list(kind.samplers) * 4
    futures += [
        engine.submit(request_for(sampler=sampler, num_inference_steps=4 + i, seed=i))
        for i, sampler in enumerate(samplers)
    ]
    held.release()
    [future.result() for future in futures]
    assert engine.usage.ticks == 1 + 7  # as many as the longest needs, after the one alone
    assert engine.usage.filled == 2 + 2 * (4 + 5 + 6 + 7)


def test_a_call_says_which_lanes_are_of_one_image(new_engine, request_for, faulty, held):
    engine = new_engine(lanes=16)
    futures = [engine.submit(request_for(seed=9, num_inference_steps=2))]
    held.wait()  # the others join after its first tick
    several = ({}, {"guidance_scale": 1.0}, {"guidance_start": 0.4}, {"guidance_stop": 0.4})
    futures += [
        engine.submit(request_for(seed=i, num_inference_steps=n, **values))
        for i, values in enumerate(several)
        for n in (5, 6)
    ]
    images = []

    def compare(latents, timesteps, conditions):
        lanes = faulty.first_lanes
        images.append(len(set(lanes)))
        assert all(first <= lane for lane, first in enumerate(lanes))
        assert torch.equal(latents[lanes], latents[: len(lanes)])
        assert torch.equal(timesteps[lanes], timesteps[: len(lanes)])
        if len(images) == 3:
            cancelled.cancel()

    faulty.on_denoise = compare
    cancelled = futures.pop(3)
    held.release()
    [future.result() for future in futures]
    # the second tick of the first; seven images of 5 or 6 ticks; one that is cancelled in its third
    assert sum(images) == 1 + 3 * 5 + 4 * 6 + 3


def test_an_image_takes_one_lane_outside_its_guidance_interval(new_engine, request_for):
    engine = new_engine(lanes=2)
    whole = engine.submit(request_for(num_inference_steps=10)).result()
    assert engine.usage.filled == 20
    part = engine.submit(
        request_for(num_inference_steps=10, guidance_start=0.2, guidance_stop=0.7)
    ).result()
    assert engine.usage.filled == 20 + 10 + 5
    assert (part.image != whole.image).any()


def test_an_image_takes_one_lane_where_its_noise_is_outside_the_interval(
    new_engine, request_for, family
):
    engine = new_engine(lanes=2)
    values = {"num_inference_steps": 10, "guidance_sigma_low": 0.5, "guidance_sigma_high": 3}
    request = request_for(**values)
    sigmas = family.sigmas(request)
    inside = int(((sigmas > 0.5) & (sigmas <= 3)).sum())
    assert 0 < inside < 10
    engine.submit(request).result()
    assert engine.usage.filled == 10 + inside


@pytest.mark.parametrize(
    "empty",
    [
        {"guidance_start": 0.5, "guidance_stop": 0.5},
        {"guidance_sigma_low": 2, "guidance_sigma_high": 2},
        {"guidance_sigma_low": 900},
    ],
)
def test_an_empty_guidance_interval_is_no_guidance(new_engine, request_for, empty):
    engine = new_engine()
    one = engine.submit(request_for(**empty)).result()
    two = engine.submit(request_for(guidance_scale=1.0)).result()
    assert np.array_equal(one.image, two.image)


def test_lanes_that_an_interval_leaves_free_are_used_and_given_back_in_time(
    new_engine, request_for, held
):
    engine = new_engine(lanes=2)
    first = engine.submit(request_for(num_inference_steps=20, guidance_start=0.5))
    held.wait()
    fits = engine.submit(request_for(num_inference_steps=8, guidance_scale=1.0))
    waits = engine.submit(request_for(num_inference_steps=12, guidance_scale=1.0))
    held.release()
    [future.result() for future in (first, fits, waits)]
    # the second runs next to the first's unguided half; the third, too long for that, after it
    assert engine.usage.ticks == 20 + 12


def test_no_request_waits_for_ever_while_longer_ones_keep_coming(new_engine, request_for):
    engine = new_engine(lanes=2)
    long = [engine.submit(request_for(num_inference_steps=3, seed=i)) for i in range(2)]
    short = engine.submit(request_for(num_inference_steps=2))
    came = 0
    while not short.done():
        wait([short, long[came]], return_when=FIRST_COMPLETED)
        if long[came].done():
            came += 1
        while len(long) < came + 2:  # one is always waiting
            long.append(engine.submit(request_for(num_inference_steps=3, seed=len(long))))
    assert came < 100  # PATIENCE * lanes = 64 may overtake it, and no more


def test_a_cancelled_request_frees_its_lanes_and_changes_no_other(new_engine, request_for, held):
    engine = new_engine(lanes=4)
    steps = {"num_inference_steps": 30}
    futures = [engine.submit(request_for(seed=seed, **steps)) for seed in range(4)]
    held.wait()
    assert futures[0].cancel()
    assert futures[3].cancel()
    held.release()
    others = [futures[1].result(), futures[2].result()]
    assert engine.usage.ticks <= 2 * 30 - 20  # the third did not wait for the end of the second
    alone = [engine.submit(request_for(seed=seed, **steps)).result() for seed in (1, 2)]
    for one, two in zip(others, alone, strict=True):
        assert np.array_equal(one.image, two.image)


def test_every_request_is_drawn_in_all_lanes_if_each_batch_shape_is_compiled(faulty, request_for):
    faulty.compiled = True
    with closing(Engine(faulty, lanes=8, threads=1)) as engine:
        drawn = engine.submit(request_for(), exact=False).result()
        assert engine.usage.rows == 8 * engine.usage.ticks
    assert (drawn.exact, drawn.lanes) == (True, 8)

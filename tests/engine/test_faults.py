"""Faults stay where they belong: a row fails alone, too little memory means fewer lanes."""

import threading

import numpy as np
import pytest
import torch

from sdbatch.errors import ModelError
from tests.engine.faulty_family import OutOfMemory


def test_a_request_that_fails_does_not_affect_its_neighbours(engine, request_for, kind):
    sampler = "lcm" if "lcm" in kind.samplers else kind.samplers[0]
    bad = request_for(sampler=sampler, num_inference_steps=900)  # more than the sampler can
    good = request_for(sampler=sampler, num_inference_steps=4)
    futures = [engine.submit(request) for request in (bad, good, bad)]
    with pytest.raises(ValueError, match="900"):
        futures[0].result()
    assert futures[1].result().image.shape == (64, 64, 3)


@pytest.mark.parametrize("hook", ["on_scheduler", "on_step"])
def test_one_of_a_cohort_that_fails_is_found_by_drawing_each_in_its_own(
    new_engine, request_for, faulty, held, hook
):
    cohorts = []

    def fail_with_seed_2(requests, *_):
        cohorts.append([request.seed for request in requests])
        if 2 in cohorts[-1]:
            raise ValueError("seed 2 is bad")

    engine = new_engine(lanes=8)
    first = engine.submit(request_for(seed=9))
    held.wait()
    setattr(faulty, hook, fail_with_seed_2)
    futures = [engine.submit(request_for(seed=seed)) for seed in range(4)]
    held.release()
    assert [future.exception() is None for future in futures] == [True, True, False, True]
    assert first.exception() is None
    assert [0, 1, 2] in cohorts  # as many as fit next to the first
    assert [2] in cohorts


def test_latents_that_are_not_finite_are_a_failed_row_and_its_neighbours_are_not(
    new_engine, request_for, faulty
):
    engine = new_engine(lanes=8)
    good = engine.submit(request_for(seed=1)).result().image

    def break_seed_2(requests, latents):
        for i, request in enumerate(requests):
            if request.seed == 2:
                latents[i] = float("nan")

    faulty.on_step = break_seed_2
    futures = [engine.submit(request_for(seed=seed)) for seed in (1, 2, 1)]
    with pytest.raises(
        ArithmeticError, match="The latents are not finite: the model cannot draw these values"
    ):
        futures[1].result()
    assert np.array_equal(futures[0].result().image, good)
    assert np.array_equal(futures[2].result().image, good)


def test_a_broken_device_ends_the_engine_and_loses_no_future(new_engine, request_for, faulty):
    engine = new_engine()
    submitted = threading.Event()

    def broken(*_):
        submitted.wait()
        raise torch.AcceleratorError("an illegal memory access was encountered")

    faulty.on_denoise = broken
    futures = [engine.submit(request_for(seed=seed)) for seed in range(9)]
    submitted.set()
    for future in futures:
        with pytest.raises(ModelError, match=r"The device failed \(an illegal memory.*again"):
            future.result()
    with pytest.raises(ModelError, match=r"The device failed"):
        engine.submit(request_for())


@pytest.mark.parametrize("hook", ["on_scheduler", "on_step"])
@pytest.mark.parametrize("lanes", [5, 8])
def test_out_of_memory_of_a_cohort_halves_the_lanes_and_with_the_fewest_fails_its_rows(
    new_engine, request_for, faulty, hook, lanes
):
    engine = new_engine(lanes=lanes)

    def fail_with_height_72(requests, *_):
        if requests[0].height == 72:
            raise torch.OutOfMemoryError("tried to allocate 20 GiB")

    setattr(faulty, hook, fail_with_height_72)
    futures = [engine.submit(request_for(seed=seed, height=72)) for seed in range(3)]
    for future in futures:
        with pytest.raises(torch.OutOfMemoryError, match="20 GiB"):
            future.result()
    counts = [text.split(" ")[0] for text in engine.usage.shrunk]
    assert counts == {5: ["2"], 8: ["4", "2"]}[lanes]
    assert engine.submit(request_for()).result().lanes == lanes  # another size


def test_out_of_memory_halves_the_lanes_and_draws_again_what_was_in_flight(
    new_engine, request_for, faulty
):
    few = new_engine(lanes=4)
    expected = [few.submit(request_for(seed=seed)).result().image for seed in range(9)]
    most = faulty.on_denoise = OutOfMemory(most=7)
    engine = new_engine(lanes=16)
    futures = [engine.submit(request_for(seed=seed)) for seed in range(9)]
    for future, image in zip(futures, expected, strict=True):
        drawn = future.result()
        assert np.array_equal(drawn.image, image)  # as if there had been 4 lanes all along
        assert drawn.lanes == 4
    assert most.raised == 2
    assert [text.split(" (")[0] for text in engine.usage.shrunk] == ["8 lanes", "4 lanes"]
    assert "OutOfMemoryError: tried to allocate 20 GiB" in engine.usage.shrunk[0]


def test_out_of_memory_in_the_middle_of_a_batch_loses_nothing(new_engine, request_for, faulty):
    few = new_engine(lanes=4)
    expected = [few.submit(request_for(seed=seed)).result().image for seed in range(9)]
    engine = new_engine(lanes=8)

    def fail_at_the_tenth_tick(latents, *_):
        if len(latents) == 8 and engine.usage.ticks == 10:
            raise torch.OutOfMemoryError("tried to allocate 20 GiB")

    faulty.on_denoise = fail_at_the_tenth_tick
    futures = [engine.submit(request_for(seed=seed)) for seed in range(9)]
    drawn = [future.result() for future in futures]
    lanes = [d.lanes for d in drawn]
    assert 0 < lanes.count(8) < 9
    assert lanes.count(8) + lanes.count(4) == 9
    for d, image in zip(drawn, expected, strict=True):
        assert d.lanes == 8 or np.array_equal(d.image, image)


def test_a_size_that_no_lanes_can_draw_fails_and_others_go_on(new_engine, request_for, faulty):
    engine = new_engine(lanes=8)

    def fail_if_high(latents, *_):
        if latents.shape[2] > latents.shape[3]:
            raise torch.OutOfMemoryError("tried to allocate 20 GiB")

    faulty.on_denoise = fail_if_high
    large = [engine.submit(request_for(seed=seed, height=72)) for seed in range(3)]
    small = [engine.submit(request_for(seed=seed)) for seed in range(3)]
    for future in large:
        with pytest.raises(torch.OutOfMemoryError, match="20 GiB"):
            future.result()
    assert [future.result().lanes for future in small] == [8, 8, 8]


@pytest.mark.parametrize(("most", "drawn"), [(3, 5), (0, 0)])
def test_out_of_memory_in_decoding_decodes_smaller_groups(
    new_engine, request_for, faulty, most, drawn
):
    engine = new_engine(lanes=8)
    faulty.on_decode = OutOfMemory(most)
    futures = [engine.submit(request_for(seed=seed)) for seed in range(5)]
    assert sum(future.exception() is None for future in futures) == drawn
    assert engine.usage.shrunk[0].startswith("2 images a decoder call (OutOfMemoryError")


def test_a_failed_request_keeps_no_tensors_of_the_call_that_failed(new_engine, request_for, faulty):
    engine = new_engine(lanes=2)
    faulty.on_denoise = OutOfMemory(most=0)
    error = engine.submit(request_for()).exception()
    engine.close()
    frames = []
    trace = error.__traceback__
    while trace is not None:
        frames.append(trace.tb_frame.f_code.co_name)
        trace = trace.tb_next
    assert "tick" not in frames

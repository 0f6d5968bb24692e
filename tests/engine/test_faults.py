"""Faults stay where they belong: a row fails alone, too little memory means fewer lanes."""

import threading

import numpy as np
import pytest
import torch

from sdbatch.engine.faults import is_lack_of_memory
from sdbatch.errors import ModelError
from tests.engine.faulty_family import OutOfMemory, nothing


class NoCompiler:
    """A hook that raises in every call, as a compiler does that is missing."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, *_) -> None:
        self.calls += 1
        raise RuntimeError("Failed to find C compiler.\nSet the CC environment variable.")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"), True),
        (torch.AcceleratorError("CUDA error: out of memory"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), True),
        (RuntimeError("GET was unable to find an engine to execute this computation"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"), True),
        (MemoryError(), True),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"), False),
        (RuntimeError("out of resource: shared memory, Required: 262144"), False),
        (RuntimeError("Failed to find C compiler. Set the CC environment variable."), False),
        (ValueError("out of memory"), False),
    ],
)
def test_a_lack_of_memory_is_known_by_its_class_or_its_librarys_text(error, expected):
    assert is_lack_of_memory(error) == expected


@pytest.mark.parametrize("hook", ["on_denoise", "on_decode"])
def test_what_every_call_would_raise_is_a_model_error_of_the_warm_up(
    new_engine, request_for, faulty, hook
):
    compiler = NoCompiler()
    setattr(faulty, hook, compiler)
    engine = new_engine(lanes=8)
    with pytest.raises(
        ModelError,
        match=r"^The model cannot draw on this device \(RuntimeError: Failed to find C compiler. "
        r"Set the CC environment variable.\). Correct the cause, or set engine.compile to false, "
        r"engine.rewrites to auto,",
    ):
        engine.warm_up(request_for())
    assert compiler.calls == 1
    assert not engine.usage.shrunk


def test_the_warm_up_makes_full_calls_of_the_requests_shape_and_counts_none(
    new_engine, request_for, faulty
):
    calls = []
    faulty.on_denoise = lambda latents, *_: calls.append(latents.shape)
    faulty.on_decode = lambda latents, dtype: calls.append(latents.shape)
    engine = new_engine(lanes=8)
    engine.warm_up(request_for(height=72))
    shape = calls[0][1:]
    assert calls == [(8, *shape), (4, *shape)]
    assert engine.usage.ticks == 0
    again = engine.submit(request_for(height=72)).result()
    assert len({call[1:] for call in calls}) == 1
    assert again.lanes == 8


def test_too_little_memory_in_the_warm_up_reduces_the_lanes_before_the_first_request(
    new_engine, request_for, faulty
):
    most = faulty.on_denoise = OutOfMemory(most=4)
    engine = new_engine(lanes=16)
    engine.warm_up(request_for())
    assert most.raised == 2
    assert engine.submit(request_for()).result().lanes == 4
    assert most.raised == 2
    assert [text.split(" (")[0] for text in engine.usage.shrunk] == ["8 lanes", "4 lanes"]


def test_too_little_memory_to_decode_a_group_in_the_warm_up_reduces_the_group(
    new_engine, request_for, faulty
):
    most = faulty.on_decode = OutOfMemory(most=2)
    engine = new_engine(lanes=8)
    engine.warm_up(request_for())
    assert not engine.submit(request_for()).result().exact
    assert most.raised == 1
    assert engine.usage.shrunk[0].startswith("2 images a decoder call (OutOfMemoryError")


@pytest.mark.parametrize("hook", ["on_denoise", "on_decode"])
def test_a_device_with_too_little_memory_for_the_fewest_lanes_is_a_model_error(
    new_engine, request_for, faulty, hook
):
    setattr(faulty, hook, OutOfMemory(most=0))
    engine = new_engine(lanes=8)
    with pytest.raises(ModelError, match=r"too little memory for an image .*20 GiB.*Set a smaller"):
        engine.warm_up(request_for())


def test_a_device_that_fails_in_the_warm_up_is_a_model_error(new_engine, request_for, faulty):
    def fail(*_):
        raise torch.AcceleratorError("CUDA error: no kernel image is available for execution")

    faulty.on_denoise = fail
    engine = new_engine()
    with pytest.raises(ModelError, match=r"cannot draw on this device .*no kernel image"):
        engine.warm_up(request_for())


def test_a_request_that_no_kernel_can_draw_fails_alone_in_full_lanes(
    new_engine, request_for, faulty
):
    engine = new_engine(lanes=8)
    expected = [engine.submit(request_for(seed=seed)).result().image for seed in range(5)]

    def enlarge_seed_2(requests, latents):
        for i, request in enumerate(requests):
            if request.seed == 2:
                latents[i] = 1e30

    def reject_large(latents, *_):
        if latents.abs().max() > 1e20:
            raise RuntimeError("the kernel rejects 1e30")

    faulty.on_step, faulty.on_denoise = enlarge_seed_2, reject_large
    futures = [engine.submit(request_for(seed=seed)) for seed in range(5)]
    with pytest.raises(RuntimeError, match="the kernel rejects 1e30"):
        futures[2].result()
    for seed in (0, 1, 3, 4):
        drawn = futures[seed].result()
        assert np.array_equal(drawn.image, expected[seed])
        assert drawn.lanes == 8
    assert not engine.usage.shrunk


def test_latents_that_no_decoder_can_decode_fail_alone_in_full_groups(
    new_engine, request_for, faulty
):
    engine = new_engine(lanes=8)

    def enlarge_seed_2(requests, latents):
        for i, request in enumerate(requests):
            if request.seed == 2:
                latents[i] = 1e30

    def reject_large(latents, _):
        if latents.abs().max() > 1e20:
            raise RuntimeError("the kernel rejects 1e30")

    faulty.on_step, faulty.on_decode = enlarge_seed_2, reject_large
    futures = [engine.submit(request_for(seed=seed, num_inference_steps=1)) for seed in range(5)]
    with pytest.raises(RuntimeError, match="the kernel rejects 1e30"):
        futures[2].result()
    assert all(futures[seed].result().exact for seed in (0, 1, 3, 4))
    assert not engine.usage.shrunk


@pytest.mark.parametrize(
    ("hook", "warm"), [("on_denoise", False), ("on_denoise", True), ("on_decode", True)]
)
def test_a_fault_of_every_call_ends_the_engine_and_fails_no_row(
    new_engine, request_for, faulty, hook, warm
):
    engine = new_engine(lanes=8)
    if warm:
        engine.warm_up(request_for())
    compiler = NoCompiler()
    setattr(faulty, hook, compiler)
    futures = [engine.submit(request_for(seed=seed)) for seed in range(9)]
    for future in futures:
        with pytest.raises(ModelError, match=r"cannot draw on this device .*C compiler"):
            future.result()
    assert compiler.calls == 1 + warm
    faulty.on_denoise = faulty.on_decode = nothing
    with pytest.raises(ModelError, match="cannot draw on this device"):
        engine.submit(request_for())


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

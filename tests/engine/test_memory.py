"""When memory runs out: fewer lanes, smaller groups, and no request lost."""

import numpy as np
import pytest
import torch

from sdbatch.engine.cohort import Cohort


@pytest.mark.parametrize("method", ["__init__", "advance"])
@pytest.mark.parametrize("lanes", [5, 8])
def test_out_of_memory_of_a_cohort_halves_the_lanes_and_with_the_fewest_fails_its_rows(
    new_engine, request_for, monkeypatch, method, lanes
):
    engine = new_engine(lanes=lanes)
    original = getattr(Cohort, method)

    def full(self, *args):
        if method == "advance" or args[0][0].request.height == 72:
            raise torch.OutOfMemoryError("tried to allocate 20 GiB")
        original(self, *args)

    monkeypatch.setattr(Cohort, method, full)
    futures = [engine.submit(request_for(seed=seed, height=72)) for seed in range(3)]
    for future in futures:
        with pytest.raises(torch.OutOfMemoryError, match="20 GiB"):
            future.result()
    counts = [text.split(" ")[0] for text in engine.usage.shrunk]
    assert counts == {5: ["2"], 8: ["4", "2"]}[lanes]
    monkeypatch.setattr(Cohort, method, original)
    assert engine.submit(request_for()).result().lanes == lanes  # another size


class OutOfMemory:
    """A call of the model that raises above a number of rows, as a full device does."""

    def __init__(self, original, most):
        self.original, self.most, self.raised = original, most, 0

    def __call__(self, latents, *args):
        if len(latents) > self.most:
            self.raised += 1
            raise torch.OutOfMemoryError("tried to allocate 20 GiB")
        return self.original(latents, *args)


def test_out_of_memory_halves_the_lanes_and_draws_again_what_was_in_flight(
    new_engine, family, request_for, replaceable
):
    few = new_engine(lanes=4)
    expected = [few.submit(request_for(seed=seed)).result().image for seed in range(9)]
    most = replaceable.denoise = OutOfMemory(family.denoise, most=7)
    engine = new_engine(lanes=16)
    futures = [engine.submit(request_for(seed=seed)) for seed in range(9)]
    for future, image in zip(futures, expected, strict=True):
        drawn = future.result()
        assert np.array_equal(drawn.image, image)  # as if there had been 4 lanes all along
        assert drawn.lanes == 4
    assert most.raised == 2
    assert [text.split(" (")[0] for text in engine.usage.shrunk] == ["8 lanes", "4 lanes"]
    assert "OutOfMemoryError: tried to allocate 20 GiB" in engine.usage.shrunk[0]


def test_out_of_memory_in_the_middle_of_a_batch_loses_nothing(
    new_engine, family, request_for, replaceable
):
    few = new_engine(lanes=4)
    expected = [few.submit(request_for(seed=seed)).result().image for seed in range(9)]
    engine = new_engine(lanes=8)

    def full_at_the_tenth_tick(latents, *args):
        if len(latents) == 8 and engine.usage.ticks == 10:
            raise torch.OutOfMemoryError("tried to allocate 20 GiB")
        return family.denoise(latents, *args)

    replaceable.denoise = full_at_the_tenth_tick
    futures = [engine.submit(request_for(seed=seed)) for seed in range(9)]
    drawn = [future.result() for future in futures]
    lanes = [d.lanes for d in drawn]
    assert 0 < lanes.count(8) < 9
    assert lanes.count(8) + lanes.count(4) == 9
    for d, image in zip(drawn, expected, strict=True):
        assert d.lanes == 8 or np.array_equal(d.image, image)


def test_a_size_that_no_lanes_can_draw_fails_and_others_go_on(
    new_engine, family, request_for, replaceable
):
    engine = new_engine(lanes=8)

    def too_large(latents, *args):
        if latents.shape[2] > latents.shape[3]:
            raise torch.OutOfMemoryError("tried to allocate 20 GiB")
        return family.denoise(latents, *args)

    replaceable.denoise = too_large
    large = [engine.submit(request_for(seed=seed, height=72)) for seed in range(3)]
    small = [engine.submit(request_for(seed=seed)) for seed in range(3)]
    for future in large:
        with pytest.raises(torch.OutOfMemoryError, match="20 GiB"):
            future.result()
    assert [future.result().lanes for future in small] == [8, 8, 8]


@pytest.mark.parametrize(("most", "drawn"), [(3, 5), (0, 0)])
def test_out_of_memory_in_decoding_decodes_smaller_groups(
    new_engine, family, request_for, replaceable, most, drawn
):
    engine = new_engine(lanes=8)
    replaceable.decode = OutOfMemory(family.decode, most)
    futures = [engine.submit(request_for(seed=seed)) for seed in range(5)]
    assert sum(future.exception() is None for future in futures) == drawn
    assert engine.usage.shrunk[0].startswith("2 images a decoder call (OutOfMemoryError")

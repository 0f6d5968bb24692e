"""A picture that is not finite in the family's type is decoded again in float32, and no other is.

The families here draw in bfloat16. A hook says which of their pictures are not finite.
"""

import threading

import numpy as np
import pytest
import torch

from sdbatch.engine.engine import Engine
from sdbatch.engine.request import Follow
from sdbatch.errors import ModelError
from sdbatch.models.build import Build
from tests.engine.faulty_family import Hold, OutOfMemory, nothing

SEEDS = range(8)


@pytest.fixture(scope="module")
def family(kind):
    return kind.load(Build("cpu", "bfloat16"))


def break_all(latents, dtype, finite):
    if dtype != torch.float32:
        finite[:] = False


def break_some(latents, dtype, finite):
    """Break pictures by their latents alone, as an overflow does."""
    if dtype != torch.float32:
        finite &= latents[:, 0, 0, 0] <= 0


@pytest.fixture
def draw(new_engine, request_for, faulty):
    """Draw seeds with an engine whose pictures a hook breaks; returns what was drawn, by seed."""

    def draw_with(hook, seeds=SEEDS, lanes=8):
        faulty.on_pictures = hook
        engine = new_engine(lanes)
        futures = {seed: engine.submit(request_for(seed=seed)) for seed in seeds}
        return {seed: future.result() for seed, future in futures.items()}

    return draw_with


def test_only_a_picture_that_is_not_finite_takes_the_float32_one_whatever_its_neighbours(draw):
    plain, again = draw(nothing), draw(break_all)
    assert not any(drawn.decoded_again for drawn in plain.values())
    assert all(drawn.decoded_again for drawn in again.values())
    assert any((plain[seed].image != again[seed].image).any() for seed in SEEDS)
    some = draw(break_some)
    assert len({drawn.decoded_again for drawn in some.values()}) == 2
    for seed in SEEDS:
        expected = again if some[seed].decoded_again else plain
        assert np.array_equal(some[seed].image, expected[seed].image)
        assert some[seed].exact
    for seeds in (SEEDS[::-1], SEEDS[::3], SEEDS[:1]):
        for seed, drawn in draw(break_some, seeds).items():
            assert drawn.decoded_again == some[seed].decoded_again
            assert np.array_equal(drawn.image, some[seed].image)


def test_the_float32_pictures_are_decoded_in_groups_of_the_same_fixed_size(draw, faulty):
    calls = []
    faulty.on_decode = lambda latents, dtype: calls.append((dtype, len(latents)))
    draw(break_some, lanes=8)
    assert {count for _, count in calls} == {4}
    assert {dtype for dtype, _ in calls} == {torch.bfloat16, torch.float32}


def test_a_picture_that_is_not_finite_in_float32_either_fails_alone_and_names_engine_dtype(
    new_engine, request_for, faulty
):
    calls = []

    def break_first(latents, dtype, finite):
        calls.append(dtype)
        finite[0] = False

    faulty.on_pictures = break_first
    engine = new_engine(lanes=8)
    future = engine.submit(request_for())
    with pytest.raises(
        ArithmeticError,
        match=r"not finite in float32, the widest engine.dtype.*Try another guidance_scale",
    ):
        future.result()
    assert calls == [torch.bfloat16, torch.float32]
    faulty.on_pictures = nothing
    assert not engine.submit(request_for()).result().decoded_again


def test_a_model_in_float32_fails_at_once(kind, new_engine, request_for, faulty):
    calls = []

    def break_each(latents, dtype, finite):
        calls.append(dtype)
        finite[:] = False

    faulty._family = kind.load()
    faulty.on_pictures = break_each
    with pytest.raises(ArithmeticError, match=r"not finite in float32, the widest engine.dtype"):
        new_engine().submit(request_for()).result()
    assert calls == [torch.float32]


def test_latents_that_are_not_finite_are_not_decoded_again(new_engine, request_for, faulty):
    calls = []
    faulty.on_step = lambda requests, latents: latents.fill_(float("inf"))
    faulty.on_decode = lambda latents, dtype: calls.append(dtype)
    with pytest.raises(ArithmeticError, match="The latents are not finite"):
        new_engine().submit(request_for()).result()
    assert calls == [torch.bfloat16]


def test_close_waits_for_what_is_decoded_again(new_engine, request_for, faulty):
    faulty.on_pictures = break_all
    for _ in range(5):
        engine = new_engine()
        futures = [engine.submit(request_for(seed=seed)) for seed in SEEDS]
        engine.close()
        assert all(future.done() and future.result().decoded_again for future in futures)


def test_close_can_cancel_what_is_decoded_again(new_engine, request_for, faulty):
    hold = Hold()
    faulty.on_pictures = break_all
    faulty.on_decode = lambda latents, dtype: hold() if dtype == torch.float32 else None
    engine = new_engine()
    futures = [engine.submit(request_for(seed=seed)) for seed in SEEDS]
    hold.wait()
    closing = threading.Thread(target=engine.close, kwargs={"cancel": True})
    closing.start()
    hold.release()
    closing.join()
    assert all(future.done() for future in futures)


def test_a_cancelled_request_that_would_be_decoded_again_harms_no_other(
    new_engine, request_for, faulty
):
    hold = Hold()
    faulty.on_pictures = break_all
    faulty.on_decode = lambda latents, dtype: hold() if dtype != torch.float32 else None
    engine = new_engine()
    futures = [engine.submit(request_for(seed=seed)) for seed in SEEDS]
    hold.wait()
    futures[0].cancel()
    hold.release()
    engine.close()
    assert futures[0].cancelled()
    assert all(future.result().decoded_again for future in futures[1:])


@pytest.mark.parametrize(("most", "drawn"), [(1, 8), (0, 0)])
def test_out_of_memory_in_float32_decodes_smaller_groups(
    new_engine, request_for, faulty, most, drawn
):
    out_of_memory = OutOfMemory(most)
    faulty.on_pictures = break_all
    faulty.on_decode = lambda latents, dtype: dtype == torch.float32 and out_of_memory(latents)
    engine = new_engine(lanes=8)
    futures = [engine.submit(request_for(seed=seed)) for seed in SEEDS]
    assert sum(future.exception() is None for future in futures) == drawn
    assert [text.split(" (")[0] for text in engine.usage.shrunk] == [
        "2 images a decoder call",
        "1 images a decoder call",
    ]


def test_a_device_that_breaks_while_it_decodes_again_ends_the_engine(
    new_engine, request_for, faulty
):
    def broken(latents, dtype):
        if dtype == torch.float32:
            raise torch.AcceleratorError("an illegal memory access was encountered")

    faulty.on_pictures, faulty.on_decode = break_all, broken
    engine = new_engine()
    for future in [engine.submit(request_for(seed=seed)) for seed in SEEDS]:
        with pytest.raises(ModelError, match=r"The device failed"):
            future.result()


def test_previews_are_decoded_again_too_and_keep_their_order(new_engine, request_for, faulty):
    faulty.on_pictures = break_all
    events = []
    follow = Follow(lambda step, steps: None, events.append, previews=3)
    engine = new_engine()
    drawn = engine.submit(request_for(num_inference_steps=8), follow=follow).result()
    engine.close()
    assert [preview.decoded_again for preview in events] == [True] * 3
    differences = [np.abs(each.image.astype(int) - drawn.image).mean() for each in events]
    assert differences == sorted(differences, reverse=True)


def test_an_engine_whose_delivery_hangs_is_not_idle(new_engine, request_for):
    hold = Hold()
    engine = new_engine()
    engine.submit(request_for(), follow=Follow(hold, print))
    hold.wait()
    first = engine.stalled_seconds
    assert 0 < first < engine.stalled_seconds
    hold.release()


class ScoresOfNoPicture:
    """A safety checker that returns too few scores, which only the delivering thread notices."""

    def scores(self, pixels):
        return torch.zeros(0, 1)


def test_what_the_delivering_thread_cannot_read_fails_its_request_and_ends_no_thread(
    kind, request_for
):
    engine = Engine(kind.load(), lanes=4, threads=1, checker=ScoresOfNoPicture())
    for seed in range(2):
        with pytest.raises(IndexError):
            engine.submit(request_for(seed=seed)).result()
    assert engine.stalled_seconds < float("inf")
    engine.close()

"""The engine: shapes take turns, no request is lost, and it ends when it is closed."""

import itertools
import threading
import time
from types import SimpleNamespace

import pytest

from sdbatch.engine import clock, turns
from sdbatch.engine.decode import MAX_IDLE_SIZES
from sdbatch.engine.engine import Engine
from sdbatch.engine.request import Follow
from sdbatch.engine.turns import MAX_IDLE_SHAPES
from sdbatch.errors import ModelError


@pytest.fixture
def equal_calls(monkeypatch):
    """Let all calls of the engine take equally long, by its clock."""
    fake_time = SimpleNamespace(perf_counter=itertools.count().__next__)
    monkeypatch.setattr(clock, "time", fake_time)


def test_sizes_take_turns(new_engine, request_for, held, equal_calls):
    engine = new_engine(lanes=2)
    ended = []
    sizes = [64] * 6 + [72]
    for i, height in enumerate(sizes):
        future = engine.submit(request_for(seed=i, height=height, num_inference_steps=20))
        future.add_done_callback(lambda _, height=height: ended.append(height))
    held.release()
    engine.close()
    assert sorted(ended) == sorted(sizes)
    assert ended.index(72) <= 2  # it had every other turn, so it ends with the first or the second


@pytest.fixture
def order_of(new_engine, request_for, held, equal_calls):
    """Draw images of 64 pixels that fill the lanes, and one of 72 that does not; return the order.

    Each takes 20 ticks.
    """

    def draw(count, exact=True):
        engine = new_engine(lanes=4)
        ended = []
        for i, height in enumerate([64] * count + [72]):
            request = request_for(seed=i, height=height, num_inference_steps=20)
            future = engine.submit(request, exact=exact or height == 64)
            future.add_done_callback(lambda _, height=height: ended.append(height))
        held.release()
        engine.close()
        assert len(ended) == count + 1
        return ended

    return draw


def test_a_size_that_would_leave_rows_empty_lets_full_ones_go_first(order_of):
    assert order_of(12)[-1] == 72


def test_a_size_that_would_leave_rows_empty_does_not_wait_without_end(order_of, monkeypatch):
    monkeypatch.setattr(turns, "PATIENCE_SECONDS", 0.0)
    assert order_of(12).index(72) <= 4


def test_a_size_whose_calls_may_be_smaller_does_not_wait(order_of):
    assert order_of(12, exact=False).index(72) <= 4


def test_a_finished_image_does_not_wait_for_the_ticks_of_another_size(
    new_engine, request_for, held, equal_calls
):
    engine = new_engine(lanes=8)
    steps, steps_at_end = [], []
    follow = Follow(lambda step, _: steps.append(step), lambda _: None, 0)
    long = request_for(height=72, num_inference_steps=60)
    futures = [engine.submit(long, exact=False, follow=follow)]
    futures.append(engine.submit(request_for(height=64, num_inference_steps=10), exact=False))
    futures[1].add_done_callback(lambda _: steps_at_end.append(len(steps)))
    held.release()
    [future.result() for future in futures]
    assert len(steps) == 60
    assert 8 <= steps_at_end[0] <= 13  # every other turn is theirs: about ten ticks each


def test_decodings_do_not_hold_the_device_while_another_size_has_had_less_of_it(
    faulty, request_for, held, equal_calls
):
    engine = Engine(faulty, lanes=32, threads=1, decode_group=1)
    ended = []
    for i, height in enumerate([72] * 12 + [64]):
        ticks = 2 if height == 72 else 5
        future = engine.submit(request_for(seed=i, height=height, num_inference_steps=ticks))
        future.add_done_callback(lambda _, height=height: ended.append(height))
    held.release()
    engine.close()
    assert len(ended) == 13
    assert ended.index(64) <= 6  # not after all twelve decodings


def test_prompt_tokens_are_counted_and_truncation_is_told(engine, request_for):
    short = engine.submit(request_for(prompt="abc")).result()
    long = engine.submit(request_for(prompt="x" * 20_000)).result()
    negative = engine.submit(request_for(negative_prompt="x" * 100)).result()
    unused = engine.submit(request_for(negative_prompt="x" * 100, guidance_scale=1.0)).result()
    assert (short.prompt_tokens, short.prompt_truncated) == (3, False)
    assert (long.prompt_tokens, long.prompt_truncated) == (20_000, True)
    assert (negative.prompt_truncated, unused.prompt_truncated) == (True, False)


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
    held.wait()
    closing = threading.Thread(target=engine.close, kwargs={"cancel": True})
    closing.start()

    def submit_until_closed():
        while True:
            futures.append(engine.submit(request_for()))

    with pytest.raises(ModelError, match="The engine is closed"):
        submit_until_closed()
    held.release()
    closing.join()
    assert all(future.cancelled() for future in futures)
    assert engine.usage.ticks <= 1


def test_usage_counts_idle_time_and_padding(new_engine, request_for):
    engine = new_engine(lanes=4)
    assert engine.usage.ticks == engine.usage.seconds == 0
    engine.submit(request_for(num_inference_steps=5)).result()
    time.sleep(0.2)  # the idle time that is measured
    engine.submit(request_for(num_inference_steps=5)).result()
    usage = engine.usage
    assert (usage.ticks, usage.rows, usage.filled) == (10, 40, 20)
    assert 0.15 < usage.idle_seconds < usage.seconds


def test_larger_images_get_fewer_lanes_by_their_area_alone(family, request_for):
    engine = Engine(family, lanes=16, threads=1, pixels=64 * 64)
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


def test_an_engine_with_nothing_to_do_is_not_stalled_and_a_stuck_one_is(
    new_engine, request_for, held
):
    engine = new_engine()
    assert engine.stalled_seconds == 0
    future = engine.submit(request_for())
    held.wait()
    first = engine.stalled_seconds
    assert 0 < first < engine.stalled_seconds
    held.release()
    future.result()


def test_a_closed_engine_counts_as_stalled(family):
    engine = Engine(family, lanes=2, threads=1)
    engine.close()
    assert engine.stalled_seconds == float("inf")


def test_an_engine_that_is_asked_for_any_size_keeps_few_of_them(new_engine, request_for):
    engine = new_engine(lanes=2)
    sizes = [(8 * i, 8 * j) for i in range(1, 11) for j in range(1, 11)]
    for height, width in sizes:
        request = request_for(
            height=height, width=width, num_inference_steps=1, guidance_scale=1.0, sampler="euler"
        )
        assert engine.submit(request).result().image.shape == (height, width, 3)
    assert len(engine._turns.shapes) <= MAX_IDLE_SHAPES + 1
    assert len(engine._decoder._sizes) <= MAX_IDLE_SIZES + 1

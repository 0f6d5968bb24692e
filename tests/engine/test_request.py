"""A request: followed, in a smaller batch where it needs no exact bits, and its steps."""

import numpy as np
import pytest

from sdbatch.engine.request import Follow, Request


class Follower:
    """Keeps what it is called with."""

    def __init__(self, previews=0):
        self.steps, self.pictures = [], []
        self.follow = Follow(self._step, self.pictures.append, previews)

    def _step(self, done, of):
        self.steps.append((done, of))


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler", "heun", "lcm"])
def test_a_follower_gets_every_tick_and_its_previews(engine, request_for, kind, sampler):
    if sampler not in kind.samplers:
        pytest.skip(f"{kind.name} has no {sampler}")
    follower = Follower(previews=2)
    drawn = engine.submit(request_for(sampler=sampler), follow=follower.follow).result()
    ticks = follower.steps[-1][1]
    assert follower.steps == [(tick, ticks) for tick in range(1, ticks + 1)]
    assert [picture.image.shape for picture in follower.pictures] == [(64, 64, 3)] * 2
    assert not any(picture.exact for picture in follower.pictures)
    far, near = (np.abs(p.image.astype(int) - drawn.image).mean() for p in follower.pictures)
    assert near < far  # they become the image


def test_following_changes_no_bit(engine, request_for, kind):
    request = request_for(sampler="euler_a" if "euler_a" in kind.samplers else kind.samplers[0])
    plain = engine.submit(request).result()
    followed = engine.submit(request, follow=Follower(previews=3).follow).result()
    assert np.array_equal(plain.image, followed.image)
    assert plain.exact
    assert followed.exact


@pytest.mark.parametrize("previews", [1, 2, 3])
@pytest.mark.parametrize("ticks", [4, 7, 25])
def test_previews_are_as_many_as_requested_and_never_the_last_tick(previews, ticks):
    follow = Follow(print, print, previews)
    due = [tick for tick in range(1, ticks + 1) if follow.is_due(tick, ticks)]
    assert len(due) == previews
    assert due[-1] < ticks


def test_a_request_without_exact_bits_is_drawn_in_few_lanes_when_alone(engine, request_for):
    exact = engine.submit(request_for()).result()
    before = engine.usage.rows, engine.usage.ticks
    quick = engine.submit(request_for(), exact=False).result()
    rows, ticks = engine.usage.rows - before[0], engine.usage.ticks - before[1]
    assert (quick.lanes, quick.exact) == (2, False)
    assert rows == 2 * ticks
    assert (exact.lanes, exact.exact) == (8, True)
    assert np.abs(quick.image.astype(int) - exact.image).max() <= 1  # the stated tolerance


def test_a_request_with_exact_bits_gets_them_among_others(new_engine, request_for, held):
    alone = request_for(seed=3)
    engine = new_engine(lanes=8)
    futures = [engine.submit(request_for(seed=seed), exact=False) for seed in (1, 2)]
    futures.append(engine.submit(alone, exact=True))
    held.release()
    drawn = [future.result() for future in futures]
    assert np.array_equal(drawn[2].image, engine.submit(alone).result().image)
    assert drawn[2].exact


def test_a_full_batch_is_exact_without_a_request_for_it(new_engine, request_for, held):
    engine = new_engine(lanes=4)
    futures = [engine.submit(request_for(seed=seed), exact=False) for seed in (1, 2, 3, 4)]
    held.release()
    drawn = [future.result() for future in futures]
    first = [engine.submit(request_for(seed=seed)).result() for seed in (1, 2, 3, 4)]
    for quick, whole in zip(drawn, first, strict=True):
        if quick.exact:
            assert np.array_equal(quick.image, whole.image)
    assert any(quick.exact for quick in drawn)


def test_a_follower_that_fails_stops_neither_its_image_nor_others(engine, request_for, capfd):
    def fail(done, of):
        raise ZeroDivisionError("a follower's own fault")

    broken = engine.submit(request_for(), follow=Follow(fail, print))
    whole = engine.submit(request_for(seed=8))
    assert broken.result().image.any()
    assert whole.result().image.any()
    assert "a follower's own fault" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("start", "stop", "interval", "ticks"),
    [
        (0.2, 0.7, 1, (2, 7)),
        (0.29, 1.0, 1, (2, 10)),
        (0.2, 0.7, 4, (4, 8)),
        (0.2, 0.3, 5, (5, 5)),
        (0.9, 1.0, 4, (10, 10)),
        (0.0, 1.0, 3, (0, 10)),
    ],
)
def test_guidance_begins_and_ends_at_ticks_whose_call_is_whole(
    request_for, start, stop, interval, ticks
):
    request = request_for(guidance_start=start, guidance_stop=stop, cache_interval=interval)
    guided = request.guided_ticks(np.zeros(10) + 1)
    assert guided.nonzero()[0].tolist() == list(range(*ticks))


@pytest.mark.parametrize(
    ("steps", "strength", "diffusers", "a1111"),
    [
        (50, 0.75, 37, 38),
        (50, 1.0, 50, 50),  # AUTOMATIC1111 caps a strength at 0.999
        (999, 1.0, 999, 999),
        (25, 0.35, 8, 9),
        (100, 0.29, 28, 29),  # 28.999.. as numbers of a computer, in both
        (1, 1.0, 1, 1),
        (1, 0.5, None, 1),
        (50, 0.01, None, 1),
        (50, 0.0, None, None),
    ],
)
def test_a_strength_leaves_as_many_steps_as_in_diffusers_or_automatic1111(
    steps, strength, diffusers, a1111
):
    for compat, drawn in (("diffusers", diffusers), ("a1111", a1111)):
        request = Request(
            prompt="a dog", num_inference_steps=steps, strength=strength, compat=compat
        )
        if drawn is None:
            with pytest.raises(ValueError, match=f"strength = {strength:g}: must leave a step"):
                request.steps_from_picture()
        else:
            assert request.steps_from_picture() == (steps, steps - drawn)


@pytest.mark.parametrize("compat", ["diffusers", "a1111"])
def test_a_second_pass_draws_all_of_its_steps_whatever_its_strength(compat):
    for strength in (0.1, 0.35, 0.7, 1.0):
        first = Request(
            prompt="a dog", hires_scale=2, hires_steps=20, hires_strength=strength, compat=compat
        )
        steps, begin = first.enlarged().steps_from_picture()
        assert steps - begin == 20

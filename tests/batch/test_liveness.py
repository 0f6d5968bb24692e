"""The watch: deaths of shards, loads of the model, signs of life, images in flight."""

import pytest

from sdbatch.batch.liveness import MOST_LOADS, Watch
from sdbatch.errors import ModelError


def signs(watch):
    return watch.snapshot([]).signs


def counts(watch, committed=()):
    snapshot = watch.snapshot(committed)
    return snapshot.drawn, snapshot.failed


def test_watch_counts_a_death_for_each_time_a_shard_was_begun_and_never_ended():
    watch = Watch(1)
    found = [watch.deaths(0)]
    for _ in range(3):
        watch.begin(0)
        found.append(watch.deaths(0))

    assert found == [0, 1, 2, 3]
    assert watch.deaths(1) == 0


def test_watch_counts_no_death_when_a_shard_ended():
    watch = Watch(1)
    watch.begin(0)
    watch.begin(1)
    watch.end(0, drawn=2, failed=1)

    assert (watch.deaths(0), watch.deaths(1)) == (0, 1)


def test_watch_forgets_earlier_deaths_when_a_shard_ended_at_last():
    watch = Watch(1)
    for _ in range(3):
        watch.begin(0)
    watch.end(0, drawn=0, failed=3)

    assert watch.deaths(0) == 0


@pytest.mark.parametrize("actors", [1, 4])
def test_watch_refuses_another_load_when_too_many_in_a_row_never_ended(actors):
    watch = Watch(actors)
    for _ in range(actors + MOST_LOADS):
        watch.loading()

    with pytest.raises(ModelError, match="loading it killed 3 actors or more") as caught:
        watch.loading()
    assert watch.snapshot([]).refused == str(caught.value)  # for the driver to tell


def test_watch_allows_any_number_of_loads_when_one_ended_in_between():
    watch = Watch(1)
    for _ in range(5):
        for _ in range(1 + MOST_LOADS):
            watch.loading()
        watch.loaded()

    watch.loading()
    assert signs(watch) == 5 * (1 + MOST_LOADS + 1) + 1


def test_watch_counts_images_of_all_shards_in_flight():
    watch = Watch(2)
    watch.begin(0)
    watch.begin(1)
    watch.beat(0, drawn=3, failed=1, ticks=7)
    watch.beat(1, drawn=2, failed=0, ticks=7)

    assert counts(watch) == (5, 1)


def test_watch_counts_a_shards_last_beat_alone():
    watch = Watch(1)
    watch.begin(0)
    for drawn in (1, 4, 6):
        watch.beat(0, drawn, failed=1, ticks=drawn)
    watch.end(0, drawn=7, failed=1)

    assert counts(watch) == (7, 1)


def test_watch_counts_a_shard_no_longer_when_it_is_committed():
    watch = Watch(1)
    for shard in (0, 1):
        watch.begin(shard)
        watch.end(shard, drawn=4, failed=2)

    assert counts(watch, committed=[0]) == (4, 2)
    assert counts(watch) == (4, 2)
    assert counts(watch, committed=[1, 5]) == (0, 0)


def test_watch_counts_a_shard_no_longer_when_its_end_arrives_after_its_receipt():
    """The end comes from the drawing actor, the receipt from the driver: either may be first."""
    watch = Watch(1)
    watch.begin(0)
    watch.beat(0, drawn=3, failed=2, ticks=5)
    watch.snapshot([0])
    watch.end(0, drawn=4, failed=2)

    assert counts(watch) == (0, 0)


@pytest.mark.parametrize(
    "sign",
    [
        lambda watch: watch.loading(),
        lambda watch: watch.loaded(),
        lambda watch: watch.begin(1),
        lambda watch: watch.end(0, drawn=3, failed=1),
        lambda watch: watch.beat(0, drawn=4, failed=1, ticks=9),
        lambda watch: watch.beat(0, drawn=3, failed=2, ticks=9),
        lambda watch: watch.beat(0, drawn=3, failed=1, ticks=10),
        lambda watch: watch.beat(1, drawn=0, failed=0, ticks=0),
    ],
    ids=["loading", "loaded", "begin", "end", "drawn", "failed", "tick", "first beat"],
)
def test_watch_sees_a_sign_of_life_when_something_moves(sign):
    watch = Watch(1)
    watch.begin(0)
    watch.beat(0, drawn=3, failed=1, ticks=9)
    before = signs(watch)
    sign(watch)

    assert signs(watch) == before + 1


def test_watch_sees_no_sign_of_life_when_a_beat_says_the_same_again():
    watch = Watch(1)
    watch.begin(0)
    watch.beat(0, drawn=3, failed=1, ticks=9)
    before = signs(watch)
    for _ in range(10):
        watch.beat(0, drawn=3, failed=1, ticks=9)
        watch.deaths(0)

    assert signs(watch) == before


def test_watch_remembers_when_the_first_engine_was_ready_and_drew():
    watch = Watch(2)
    assert (watch.snapshot([]).loaded_at, watch.snapshot([]).drawn_at) == (0, 0)
    watch.loaded()
    watch.begin(0)
    watch.beat(0, drawn=0, failed=0, ticks=1)
    assert watch.snapshot([]).drawn_at == 0
    watch.beat(0, drawn=1, failed=0, ticks=5)
    first = watch.snapshot([])
    watch.loaded()
    watch.beat(0, drawn=2, failed=0, ticks=6)
    later = watch.snapshot([])

    assert 0 < first.loaded_at <= first.drawn_at
    assert (later.loaded_at, later.drawn_at) == (first.loaded_at, first.drawn_at)


def test_watch_remembers_why_an_engine_was_refused():
    watch = Watch(1)
    assert watch.snapshot([]).refused is None
    watch.refused("model.path = a dog: must be a model.")

    assert watch.snapshot([]).refused == "model.path = a dog: must be a model."

"""Liveness: deaths of shards, loads of the model, signs of life, images in flight."""

import asyncio

import pytest

from sdbatch.batch.liveness import MOST_LOADS, Liveness
from sdbatch.errors import ModelError
from tests.finished import HERE, LocalLiveness


def signs(liveness):
    return liveness.snapshot([]).signs


def counts(liveness, committed=()):
    snapshot = liveness.snapshot(committed)
    return snapshot.drawn, snapshot.failed


def test_liveness_counts_a_death_for_each_time_a_shard_was_begun_and_not_ended():
    liveness = Liveness(1)
    found = [liveness.deaths(0)]
    for node in "aab":
        liveness.begin(0, node)
        found.append(liveness.deaths(0))

    assert found == [[], ["a"], ["a", "a"], ["a", "a", "b"]]
    assert liveness.deaths(1) == []


def test_liveness_counts_the_attempts_of_each_shard():
    liveness = Liveness(1)

    assert [liveness.begin(shard, "a") for shard in (0, 0, 1, 0)] == [1, 2, 1, 3]


def test_a_drawing_actor_hears_of_no_death_whose_node_is_gone():
    class Cluster(LocalLiveness):
        def living_nodes(self):
            return living

    liveness, living = Cluster(), {"a", "b"}
    for node in "aab":
        liveness.state.begin(0, node)
    assert asyncio.run(liveness.deaths(0)) == 3
    living.remove("a")
    assert asyncio.run(liveness.deaths(0)) == 1
    living.clear()
    assert asyncio.run(liveness.deaths(0)) == 0


def test_a_drawing_actor_begins_a_shard_on_its_own_node():
    liveness = LocalLiveness()

    assert [asyncio.run(liveness.begin(3)) for _ in range(2)] == [1, 2]
    assert liveness.state.deaths(3) == [HERE, HERE]


def test_liveness_counts_no_death_when_a_shard_ended():
    liveness = Liveness(1)
    liveness.begin(0, "a")
    liveness.begin(1, "a")
    liveness.end(0, drawn=2, failed=1)

    assert (liveness.deaths(0), liveness.deaths(1)) == ([], ["a"])


def test_liveness_forgets_earlier_deaths_when_a_shard_has_ended():
    liveness = Liveness(1)
    for _ in range(3):
        liveness.begin(0, "a")
    liveness.end(0, drawn=0, failed=3)

    assert liveness.deaths(0) == []


@pytest.mark.parametrize("actors", [1, 4])
def test_liveness_rejects_another_load_when_too_many_in_a_row_never_ended(actors):
    liveness = Liveness(actors)
    for _ in range(actors + MOST_LOADS):
        liveness.loading()

    with pytest.raises(ModelError, match="Loading the model killed 3 actors or more") as caught:
        liveness.loading()
    assert liveness.snapshot([]).rejected == str(caught.value)  # for the driver to tell


def test_liveness_allows_any_number_of_loads_when_one_ended_in_between():
    liveness = Liveness(1)
    for _ in range(5):
        for _ in range(1 + MOST_LOADS):
            liveness.loading()
        liveness.loaded()

    liveness.loading()
    assert signs(liveness) == 5 * (1 + MOST_LOADS + 1) + 1


def test_liveness_counts_images_of_all_shards_in_flight():
    liveness = Liveness(2)
    liveness.begin(0, "a")
    liveness.begin(1, "a")
    liveness.beat(0, drawn=3, failed=1, ticks=7)
    liveness.beat(1, drawn=2, failed=0, ticks=7)

    assert counts(liveness) == (5, 1)


def test_liveness_counts_a_shards_last_beat_alone():
    liveness = Liveness(1)
    liveness.begin(0, "a")
    for drawn in (1, 4, 6):
        liveness.beat(0, drawn, failed=1, ticks=drawn)
    liveness.end(0, drawn=7, failed=1)

    assert counts(liveness) == (7, 1)


def test_liveness_counts_a_shard_no_longer_when_it_is_committed():
    liveness = Liveness(1)
    for shard in (0, 1):
        liveness.begin(shard, "a")
        liveness.end(shard, drawn=4, failed=2)

    assert counts(liveness, committed=[0]) == (4, 2)
    assert counts(liveness) == (4, 2)
    assert counts(liveness, committed=[1, 5]) == (0, 0)


def test_liveness_counts_a_shard_no_longer_when_its_end_arrives_after_its_receipt():
    """The end comes from the drawing actor, the receipt from the driver: either may be first."""
    liveness = Liveness(1)
    liveness.begin(0, "a")
    liveness.beat(0, drawn=3, failed=2, ticks=5)
    liveness.snapshot([0])
    liveness.end(0, drawn=4, failed=2)

    assert counts(liveness) == (0, 0)


@pytest.mark.parametrize(
    "sign",
    [
        lambda liveness: liveness.loading(),
        lambda liveness: liveness.loaded(),
        lambda liveness: liveness.begin(1, "a"),
        lambda liveness: liveness.end(0, drawn=3, failed=1),
        lambda liveness: liveness.beat(0, drawn=4, failed=1, ticks=9),
        lambda liveness: liveness.beat(0, drawn=3, failed=2, ticks=9),
        lambda liveness: liveness.beat(0, drawn=3, failed=1, ticks=10),
        lambda liveness: liveness.beat(1, drawn=0, failed=0, ticks=0),
    ],
    ids=["loading", "loaded", "begin", "end", "drawn", "failed", "tick", "first beat"],
)
def test_liveness_sees_a_sign_of_life_when_something_moves(sign):
    liveness = Liveness(1)
    liveness.begin(0, "a")
    liveness.beat(0, drawn=3, failed=1, ticks=9)
    before = signs(liveness)
    sign(liveness)

    assert signs(liveness) == before + 1


def test_liveness_sees_no_sign_of_life_when_a_beat_says_the_same_again():
    liveness = Liveness(1)
    liveness.begin(0, "a")
    liveness.beat(0, drawn=3, failed=1, ticks=9)
    before = signs(liveness)
    for _ in range(10):
        liveness.beat(0, drawn=3, failed=1, ticks=9)
        liveness.deaths(0)

    assert signs(liveness) == before


def test_liveness_remembers_when_the_first_engine_was_ready_and_drew():
    liveness = Liveness(2)
    assert (liveness.snapshot([]).loaded_at, liveness.snapshot([]).drawn_at) == (0, 0)
    liveness.loaded()
    liveness.begin(0, "a")
    liveness.beat(0, drawn=0, failed=0, ticks=1)
    assert liveness.snapshot([]).drawn_at == 0
    liveness.beat(0, drawn=1, failed=0, ticks=5)
    first = liveness.snapshot([])
    liveness.loaded()
    liveness.beat(0, drawn=2, failed=0, ticks=6)
    later = liveness.snapshot([])

    assert 0 < first.loaded_at <= first.drawn_at
    assert (later.loaded_at, later.drawn_at) == (first.loaded_at, first.drawn_at)


def test_liveness_remembers_why_an_engine_was_rejected():
    liveness = Liveness(1)
    assert liveness.snapshot([]).rejected is None
    liveness.rejected("model.path = a dog: must be a model.")

    assert liveness.snapshot([]).rejected == "model.path = a dog: must be a model."


def test_liveness_lets_drawing_begin_when_the_driver_says_so():
    liveness = Liveness(1)
    assert not liveness.may_draw()
    assert not liveness.snapshot([]).open
    liveness.open()

    assert liveness.may_draw()
    assert liveness.snapshot([]).open


def test_liveness_keeps_no_actor_waiting_when_the_run_has_ended_before_drawing():
    liveness = Liveness(1)
    liveness.begin(0, "a node")
    liveness.close()

    with pytest.raises(ModelError, match="has stopped"):
        liveness.may_draw()
    assert not liveness.snapshot([]).open
    assert not liveness.beat(0, 0, 0, 0)  # so that drawing ends at once

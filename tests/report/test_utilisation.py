"""How well the engines of a run were used, from its receipts."""

from sdbatch.output.receipts import Receipt
from sdbatch.report import utilisation


def receipt(shard, pid=1, lanes=None, **engine):
    used = {"seconds": 10.0, "idle_seconds": 0.0, "ticks": 100, "rows": 1600, "filled": 1600}
    facts = {"host": "a", "pid": pid, "lanes": lanes or {"16": 10}}
    facts["engine"] = {**used, "shrunk": [], **engine}
    return Receipt(shard, 10, 0, {}, [], facts)


def test_an_engine_that_never_waited_and_filled_its_lanes_had_the_bare_engines_speed():
    found = utilisation.of([receipt(0)], seconds=10.0)
    assert (found.speed, found.idle, found.filled) == (1.0, 0.0, 1.0)
    assert found.lines() == [
        "  engine:      100% of the bare engine's speed (idle 0%, lanes 100% filled)"
    ]


def test_idle_time_padding_and_the_time_that_an_engine_was_not_there_cost_speed():
    last = receipt(1, idle_seconds=2.0, filled=1200)
    found = utilisation.of([last, receipt(0, ticks=50)], seconds=16.0)  # the last state counts
    assert (found.speed, found.idle, found.filled) == (0.375, 0.5, 0.75)


def test_engines_of_several_actors_are_taken_together():
    found = utilisation.of([receipt(0), receipt(1, pid=2, seconds=5.0)], seconds=10.0)
    assert (found.speed, found.idle) == (0.75, 0.25)


def test_memory_that_ran_out_is_told_with_the_way_to_equal_images():
    shrunk = ["8 lanes (OutOfMemoryError: 20 GiB)"]
    found = utilisation.of([receipt(0, lanes={"16": 4, "8": 6}, shrunk=shrunk)], seconds=10.0)
    assert found.lines()[1:] == [
        "  went on with 8 lanes (OutOfMemoryError: 20 GiB)",
        "  images drawn in unequal lanes: 4 in 16, 6 in 8. For equal ones set engine.lanes to 8 "
        "and start anew.",
    ]


def test_a_run_that_drew_nothing_has_no_engines():
    assert utilisation.of([], 10.0) is None
    assert utilisation.of([Receipt(0, 1, 0, {}, [])], 10.0) is None
    assert utilisation.of([receipt(0)], 0.0) is None

"""Shapes share the device by the time of their calls, not by their number."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from sdbatch.engine import turns as turns_module
from sdbatch.engine.clock import Account
from sdbatch.engine.turns import Turns


@dataclass(eq=False)
class Work:
    """The part of Lanes that Turns uses."""

    cost: float = 1.0
    busy: bool = True
    fills_rows: bool = True
    waiting: int = 0
    account: Account = field(default_factory=Account)
    gave_way_at: float | None = None


def turns_of(**works):
    """Return turns over named work, in which each had a call."""
    turns = Turns()
    for name, work in works.items():
        turns.lanes_for(name, lambda work=work: work)
    return turns


def take(turns, count):
    """Take turns; return the names of those whose turns they were."""
    names = []
    for _ in range(count):
        turns.choose_candidates()
        work = turns.next()
        work.account.seconds += work.cost
        names.append(next(name for name, each in turns.shapes.items() if each is work))
    return names


def test_expensive_calls_get_as_much_time_as_cheap_ones():
    names = take(turns_of(large=Work(cost=8.0), small=Work(cost=0.5)), 170)
    assert abs(names.count("large") * 8.0 - names.count("small") * 0.5) <= 8.0


def test_a_newcomer_waits_for_one_call_of_each_other_shape():
    turns = turns_of(large=Work(cost=8.0), larger=Work(cost=20.0))
    take(turns, 50)
    turns.lanes_for("small", lambda: Work(cost=0.5))
    first = take(turns, 40)
    assert first.index("small") <= 2
    gap = "".join("s" if name == "small" else "l" for name in first)
    assert "lll" not in gap


def test_idle_time_is_not_saved_up():
    idle = Work(busy=False)
    turns = turns_of(steady=Work(), idle=idle)
    take(turns, 100)
    idle.account.seconds = 0.0
    assert turns.lanes_for("idle", Work) is idle
    idle.busy = True
    assert take(turns, 20).count("idle") == 10


def test_a_shape_with_empty_rows_gives_way_and_saves_no_time_up(monkeypatch):
    partly = Work(fills_rows=False)
    turns = turns_of(full=Work(), partly=partly)
    assert take(turns, 50) == ["full"] * 50
    monkeypatch.setattr(turns_module, "PATIENCE_SECONDS", 0.0)
    assert take(turns, 20).count("partly") in (10, 11)


def test_a_shape_that_gave_way_has_its_share_until_it_is_full(monkeypatch):
    seconds = [0.0]
    monkeypatch.setattr(
        turns_module, "time", SimpleNamespace(perf_counter=lambda: seconds[0] + 1.0)
    )
    partly = Work(fills_rows=False)
    turns = turns_of(full=Work(), partly=partly)
    assert take(turns, 10) == ["full"] * 10
    seconds[0] = turns_module.PATIENCE_SECONDS
    assert take(turns, 40).count("partly") in (20, 21)
    partly.fills_rows = True
    take(turns, 2)
    partly.fills_rows = False
    assert take(turns, 10).count("partly") == 0


def test_a_shape_that_is_evicted_is_not_drawing_any_more():
    """Its last image waits for no others to be decoded with."""
    first = Work()
    turns = turns_of(first=first)
    turns.choose_candidates()
    assert first.account.drawing
    first.busy = False
    for number in range(turns_module.MAX_IDLE_SHAPES + 1):
        turns.lanes_for(number, lambda: Work(busy=False))
    turns.lanes_for("last", Work)
    assert "first" not in turns.shapes
    assert not first.account.drawing


def test_the_shape_that_was_used_least_recently_is_evicted():
    turns = turns_of(often=Work(busy=False), once=Work(busy=False))
    for number in range(turns_module.MAX_IDLE_SHAPES - 1):
        turns.lanes_for("often", Work)
        turns.lanes_for(number, lambda: Work(busy=False))
    turns.lanes_for("new", Work)
    assert "often" in turns.shapes
    assert "once" not in turns.shapes


def test_a_shape_that_is_alone_does_not_wait():
    assert take(turns_of(partly=Work(fills_rows=False)), 2) == ["partly"] * 2
    turns = turns_of(idle=Work(busy=False))
    turns.choose_candidates()
    assert turns.next() is None
    assert turns.is_due(Account(seconds=100.0))


@pytest.mark.parametrize(("seconds", "due"), [(0.5, True), (1.0, True), (1.5, False)])
def test_a_decoding_is_due_when_its_shape_has_had_least_time(seconds, due):
    turns = turns_of(a=Work(), b=Work())
    take(turns, 2)
    turns.choose_candidates()
    assert turns.is_due(Account(seconds=seconds)) is due

"""Metrics of a run that add up, and two lines a stage in a worker's log."""

import logging

import pytest

from sdbatch.batch import metrics
from sdbatch.batch.metrics import RayMetrics
from sdbatch.engine.request import Usage


class FakeMetric:
    """A metric that keeps its values, by the values of its tags."""

    def __init__(self):
        self.values = {}

    def inc(self, value, tags):
        key = tuple(tags.values())
        self.values[key] = self.values.get(key, 0) + value

    def set(self, value, tags):
        self.values[tuple(tags.values())] = value

    def observe(self, value, tags):
        self.values.setdefault(tuple(tags.values()), []).append(value)


@pytest.fixture
def reported(monkeypatch):
    """Keep what Ray would count."""
    kept = {name: FakeMetric() for name in (*metrics.COUNTERS, *metrics.GAUGES, "stage_seconds")}
    monkeypatch.setattr(metrics, "_metrics", lambda: kept)
    return kept


@pytest.fixture
def log(monkeypatch):
    """Catch the lines of the worker's log."""
    lines = []

    class Handler(logging.Handler):
        def emit(self, record):
            lines.append((record.levelname, record.getMessage()))

    found = logging.Logger("here")
    found.addHandler(Handler())
    monkeypatch.setattr(metrics, "_log", lambda: found)
    return lines


def test_engines_counters_grow_by_what_is_new(reported):
    counted = RayMetrics("dogs")
    counted.engine(Usage(seconds=10.0, idle_seconds=2.0, ticks=5, rows=160, filled=100), queue=7)
    counted.engine(Usage(seconds=12.0, idle_seconds=2.0, ticks=6, rows=192, filled=130), queue=3)
    found = {name: kept.values.get(("dogs",)) for name, kept in reported.items()}
    assert found["engine_seconds"] == 12.0
    assert found["engine_idle_seconds"] == 2.0
    assert (found["ticks"], found["lanes"], found["lanes_filled"]) == (6, 192, 130)
    assert found["queue"] == 3


def test_images_are_counted_by_their_outcome(reported):
    counted = RayMetrics("dogs")
    counted.images(drawn=3)
    counted.images(drawn=2, failed=1, dropped=1)
    assert reported["images"].values == {
        ("dogs", "drawn"): 5,
        ("dogs", "failed"): 1,
        ("dogs", "dropped"): 1,
    }


def test_a_stage_leaves_two_lines_and_its_seconds(reported, log):
    with RayMetrics("dogs").stage("draw", 12, "50 rows, attempt 2"):
        pass
    assert log[0] == ("INFO", "shard 000012 draw: begun, 50 rows, attempt 2")
    assert log[1][1].startswith("shard 000012 draw: ended after 0.0")
    (seconds,) = reported["stage_seconds"].values[("dogs", "draw")]
    assert 0 <= seconds < 10


def test_a_stage_that_fails_says_why_and_is_not_timed(reported, log):
    with pytest.raises(OSError, match="disk"), RayMetrics("dogs").stage("write", 3):
        raise OSError("disk full")
    assert log[1] == ("WARNING", "shard 000003 write: failed, OSError: disk full")
    assert reported["stage_seconds"].values == {}

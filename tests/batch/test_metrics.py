"""Metrics of a run that add up, and two lines a stage in a worker's log."""

import logging

import pytest

from sdbatch.batch import metrics
from sdbatch.batch.metrics import RayMetrics
from sdbatch.engine.request import Usage


class FakeMetric:
    """A metric of Ray that keeps its values, by those of its tags."""

    def __init__(self, tag_keys):
        self.tag_keys, self.values = tag_keys, {}

    def inc(self, value, tags):
        key = self._key(tags)
        self.values[key] = self.values.get(key, 0) + value

    def set(self, value, tags):
        self.values[self._key(tags)] = value

    def observe(self, value, tags):
        self.values.setdefault(self._key(tags), []).append(value)

    def _key(self, tags):
        assert set(tags) == set(self.tag_keys)
        return tuple(tags.values())


@pytest.fixture
def reported(monkeypatch):
    """Keep what Ray would count, by the names of the metrics."""
    kept = {}

    def make(name, description, *options, tag_keys=None):
        kept[name.removeprefix("sdbatch_")] = metric = FakeMetric(tag_keys or options[0])
        return metric

    for kind in ("Counter", "Gauge", "Histogram"):
        monkeypatch.setattr(f"ray.util.metrics.{kind}", make)
    metrics._metrics.cache_clear()
    metrics._metrics()
    yield kept
    metrics._metrics.cache_clear()


@pytest.fixture
def log(caplog):
    """Catch the lines of the worker's log, which goes nowhere else."""
    logger = logging.getLogger("sdbatch.shards")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


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
    begun, ended = log.records
    assert begun.levelname == "INFO"
    assert begun.getMessage() == "shard 000012 draw: begun, 50 rows, attempt 2"
    assert ended.getMessage().startswith("shard 000012 draw: ended after 0.0")
    (seconds,) = reported["stage_seconds"].values[("dogs", "draw")]
    assert 0 <= seconds < 10


def test_a_stage_that_fails_says_why_and_is_not_timed(reported, log):
    with pytest.raises(OSError, match="disk"), RayMetrics("dogs").stage("write", 3):
        raise OSError("disk full")
    assert log.records[1].levelname == "WARNING"
    assert log.records[1].getMessage() == "shard 000003 write: failed, OSError: disk full"
    assert reported["stage_seconds"].values == {}

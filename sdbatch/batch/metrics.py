"""Ray metrics of a run, and lines in the logs of Ray's workers.

Metrics are counted in the process that does the work. Ray's agent on each machine passes them to
Prometheus, and cluster/grafana.json draws them. Each shard leaves two lines a stage in its worker's
log: `grep "shard 000012" /tmp/ray/session_latest/logs/worker-*.err`.
"""

import contextlib
import functools
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sdbatch import schema
from sdbatch.engine.request import Usage

_SECONDS = [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000]
_LOG = "%(asctime)s %(message)s"


class Metrics:
    """Counts nothing, for stages that run without Ray."""

    @contextlib.contextmanager
    def stage(self, name: str, shard: int, details: str = "") -> Iterator[None]:
        """Log and time the stage `name` of `shard`."""
        yield

    def images(self, *, drawn: int = 0, failed: int = 0, dropped: int = 0) -> None:
        """Count images that were drawn, failed, or were dropped by a stage after drawing."""

    def engine(self, usage: Usage, queue: int) -> None:
        """Count what this process's engine did since the last call, and the requests it holds."""

    def output(self, planned: int, done: int) -> None:
        """Set how many images the whole output will have, and has."""


@dataclass
class RayMetrics(Metrics):
    """Counts in Ray's metrics and writes to the worker's log."""

    dataset: str  # its name; not "job", which Prometheus uses itself

    def __post_init__(self) -> None:
        self._last = (0.0, 0.0, 0, 0, 0)  # of this process's engine

    @contextlib.contextmanager
    def stage(self, name: str, shard: int, details: str = "") -> Iterator[None]:
        """See Metrics.stage."""
        log, what = _log(), f"shard {schema.shard_name(shard)} {name}"
        log.info("%s: begun%s", what, details and f", {details}")
        began = time.perf_counter()
        try:
            yield
        except BaseException as error:
            log.warning("%s: failed, %s: %s", what, type(error).__name__, error)
            raise
        seconds = time.perf_counter() - began
        log.info("%s: ended after %.2f s", what, seconds)
        _metrics()["stage_seconds"].observe(seconds, {"dataset": self.dataset, "stage": name})

    def images(self, *, drawn: int = 0, failed: int = 0, dropped: int = 0) -> None:
        """See Metrics.images."""
        for outcome, count in (("drawn", drawn), ("failed", failed), ("dropped", dropped)):
            if count > 0:
                _metrics()["images"].inc(count, {"dataset": self.dataset, "outcome": outcome})

    def engine(self, usage: Usage, queue: int) -> None:
        """See Metrics.engine."""
        now = (usage.seconds, usage.idle_seconds, usage.ticks, usage.rows, usage.filled)
        for name, before, count in zip(_ENGINE, self._last, now, strict=True):
            if count > before:
                _metrics()[name].inc(count - before, {"dataset": self.dataset})
        self._last = now
        _metrics()["queue"].set(queue, {"dataset": self.dataset})

    def output(self, planned: int, done: int) -> None:
        """See Metrics.output."""
        _metrics()["images_planned"].set(planned, {"dataset": self.dataset})
        _metrics()["images_done"].set(done, {"dataset": self.dataset})


_ENGINE = (
    "engine_seconds",
    "engine_idle_seconds",
    "ticks",
    "lanes",
    "lanes_filled",
)
COUNTERS = {
    "images": "Images that were drawn, failed, or were dropped after drawing.",
    "engine_seconds": "Seconds of engines since their first request.",
    "engine_idle_seconds": "Of these, seconds without any request: the GPU waits.",
    "ticks": "Denoiser calls.",
    "lanes": "Lanes of all denoiser calls.",
    "lanes_filled": "Of these, lanes that were not padding.",
}
GAUGES = {
    "queue": "Requests that an actor's engine holds.",
    "images_planned": "Images that the output will have.",
    "images_done": "Images that the output has, with those in flight.",
}


@functools.cache
def _metrics() -> dict[str, Any]:
    """Return the metrics of this process; Ray allows to make each of them once."""
    from ray.util.metrics import Counter, Gauge, Histogram

    own: dict[str, tuple[str, ...]] = {"images": ("dataset", "outcome")}
    metrics: dict[str, Any] = {}
    for name, text in COUNTERS.items():
        metrics[name] = Counter(f"sdbatch_{name}", text, own.get(name, ("dataset",)))
    for name, text in GAUGES.items():
        metrics[name] = Gauge(f"sdbatch_{name}", text, ("dataset",))
    text = "Seconds of a shard in a stage, such as read, draw, write."
    metrics["stage_seconds"] = Histogram(
        "sdbatch_stage_seconds", text, _SECONDS, tag_keys=("dataset", "stage")
    )
    return metrics


@functools.cache
def _log() -> logging.Logger:
    """Return the log of this process. It goes to stderr, of which Ray keeps a file a worker."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(_LOG))
    log = logging.getLogger("sdbatch.shards")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False  # or Ray's own handler prints each line again
    return log

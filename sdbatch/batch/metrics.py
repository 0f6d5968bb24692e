"""What a run tells the outside as it goes: Ray metrics, and lines in the logs of Ray's workers.

Metrics are counted in the process where the work is done; Ray's agent on each machine hands them to
Prometheus, and cluster/grafana.json draws them. Each shard leaves two lines a stage in its
worker's log: `grep "shard 000012" /tmp/ray/session_latest/logs/worker-*.err`.
"""

import contextlib
import functools
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from sdbatch import schema

_SECONDS = [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000]
_LOG = "%(asctime)s %(message)s"


class Work(Protocol):
    """What an engine has done so far; engine.request.Usage is it."""

    seconds: float
    idle_seconds: float
    ticks: int
    rows: int
    filled: int


class Monitor:
    """Tells nobody: for stages that are called without a run around them."""

    @contextlib.contextmanager
    def stage(self, name: str, shard: int, say: str = "") -> Iterator[None]:
        """Note that `shard` is in the stage `name`: "read", "draw" or "write"."""
        yield

    def images(self, drawn: int, failed: int) -> None:
        """Count images that were drawn, or failed."""

    def engine(self, work: Work, queue: int) -> None:
        """Count what this process's engine did since the last call; `queue`: requests it holds."""

    def output(self, planned: int, done: int) -> None:
        """Say how many images the whole output will have, and has."""


NOBODY = Monitor()


@dataclass
class RayMonitor(Monitor):
    """Tells Ray's metrics and the worker's log."""

    dataset: str  # its name; not "job", which Prometheus uses itself

    def __post_init__(self) -> None:
        self._last = (0.0, 0.0, 0, 0, 0)  # of this process's engine

    @contextlib.contextmanager
    def stage(self, name: str, shard: int, say: str = "") -> Iterator[None]:
        """See Monitor.stage."""
        log, what = _log(), f"shard {schema.shard_name(shard)} {name}"
        log.info("%s: begun%s", what, say and f", {say}")
        began = time.perf_counter()
        try:
            yield
        except BaseException as error:
            log.warning("%s: gave up, %s: %s", what, type(error).__name__, error)
            raise
        seconds = time.perf_counter() - began
        log.info("%s: ended after %.2f s", what, seconds)
        _metrics()["stage_seconds"].observe(seconds, {"dataset": self.dataset, "stage": name})

    def images(self, drawn: int, failed: int) -> None:
        """See Monitor.images."""
        for outcome, count in (("drawn", drawn), ("failed", failed)):
            if count > 0:
                _metrics()["images"].inc(count, {"dataset": self.dataset, "outcome": outcome})

    def engine(self, work: Work, queue: int) -> None:
        """See Monitor.engine."""
        now = (work.seconds, work.idle_seconds, work.ticks, work.rows, work.filled)
        for name, before, count in zip(_ENGINE, self._last, now, strict=True):
            if count > before:
                _metrics()[name].inc(count - before, {"dataset": self.dataset})
        self._last = now
        _metrics()["queue"].set(queue, {"dataset": self.dataset})

    def output(self, planned: int, done: int) -> None:
        """See Monitor.output."""
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
    "images": "Images that were drawn or failed.",
    "engine_seconds": "Seconds that engines have been there, since their first request.",
    "engine_idle_seconds": "Of these, seconds without any request: the GPU waits.",
    "ticks": "UNet calls.",
    "lanes": "Lanes of all UNet calls.",
    "lanes_filled": "Of these, lanes that drew.",
}
GAUGES = {
    "queue": "Requests that an actor's engine holds.",
    "images_planned": "Images that the output will have.",
    "images_done": "Images that the output has, with those in flight.",
}


@functools.cache
def _metrics() -> dict[str, Any]:
    """Return the metrics of this process; Ray wants each made once."""
    from ray.util.metrics import Counter, Gauge, Histogram

    own: dict[str, tuple[str, ...]] = {"images": ("dataset", "outcome")}
    made: dict[str, Any] = {}
    for name, text in COUNTERS.items():
        made[name] = Counter(f"sdbatch_{name}", text, own.get(name, ("dataset",)))
    for name, text in GAUGES.items():
        made[name] = Gauge(f"sdbatch_{name}", text, ("dataset",))
    text = "Seconds of a shard in a stage: read, draw, write."
    made["stage_seconds"] = Histogram(
        "sdbatch_stage_seconds", text, _SECONDS, tag_keys=("dataset", "stage")
    )
    return made


@functools.cache
def _log() -> logging.Logger:
    """Return the log of this process, which goes to stderr: Ray keeps a file of it a worker."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(_LOG))
    log = logging.getLogger("sdbatch.shards")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False  # or Ray's own handler prints each line again
    return log

"""A run without Ray: the plan, the driver and the stages are real, and all of them in this process.

What Ray itself does (actors that die, errors that it wraps, shards that it shares out) is shown in
tests/ray.
"""

import asyncio
import contextlib
import threading
from collections.abc import Iterator

import pyarrow as pa
import pytest

from sdbatch.batch import flow, pipeline
from sdbatch.batch.blocks import BlockStage
from sdbatch.batch.drawing_actor import DrawingActor
from sdbatch.batch.metrics import Metrics
from sdbatch.batch.pool import Machine, Machines
from sdbatch.job import Job
from sdbatch.report.closing import Report
from sdbatch.report.progress import SilentDisplay
from tests.fakes import FakeEngine
from tests.finished import LocalLiveness

MACHINES = Machines((Machine(cpus=3, gpus=0),))


class LocalFlow:
    """The data flow of a run with one actor, in the thread that asks for its blocks."""

    def __init__(self, todo, urls, stages, setup) -> None:
        self._blocks = [
            window.slice(at, 1)
            for window in flow.windows(todo, urls, readers=1)
            for at in range(window.num_rows)
        ]
        self._stages = stages
        self._setup = setup
        self.ended = threading.Event()

    def iter_batches(self, **_) -> Iterator[pa.Table]:
        """Yield the receipt of each shard; the actor draws as many at a time as the setup says."""
        liveness, metrics = self._setup.liveness, self._setup.metrics
        at_a_time = self._setup.in_flight
        read, draw, *rest = self._stages
        try:
            actor = DrawingActor(draw, liveness, metrics)
            with asyncio.Runner() as loop:
                for at in range(0, len(self._blocks), at_a_time):
                    blocks = map(BlockStage(read, metrics), self._blocks[at : at + at_a_time])
                    for shard in loop.run(_together(actor, blocks)):
                        for stage in rest:
                            shard = BlockStage(stage, metrics)(shard)
                        yield shard
        finally:
            if hasattr(getattr(draw, "engine", None), "close"):
                draw.engine.close(cancel=True)
            self.ended.set()


async def _together(actor, blocks):
    return await asyncio.gather(*map(actor, blocks))


@contextlib.contextmanager
def without_ray() -> Iterator[None]:
    """Let every run in this context do without Ray."""
    flows: list[LocalFlow] = []

    def lay_out(*arguments):
        flows.append(LocalFlow(*arguments))
        return flows[-1]

    @contextlib.contextmanager
    def connected(address, job):
        yield MACHINES

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.ray_setup, "connected", connected)
        patch.setattr(pipeline.ray_setup, "start_liveness", LocalLiveness)
        patch.setattr(pipeline, "RayMetrics", lambda dataset: Metrics())
        patch.setattr(flow, "lay_out", lay_out)
        yield
        assert all(each.ended.wait(60) for each in flows)


def draw(job: Job, make_engine=FakeEngine, display=None, max_failed=None, **options) -> Report:
    """Run a job without Ray, with the fake engine or another; `options` are those of prepare."""
    ready = pipeline.prepare(job, **options)
    with without_ray():
        return pipeline.draw(
            ready,
            display=display or SilentDisplay(),
            make_engine=make_engine,
            max_failed=max_failed,
        )

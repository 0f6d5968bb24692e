"""The data flow that Ray Data runs: windows of the plan -> rows -> images -> files and receipts."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from sdbatch.batch import pool, ray_setup
from sdbatch.batch.liveness import RemoteWatch
from sdbatch.batch.metrics import Monitor
from sdbatch.batch.pool import Pool
from sdbatch.output.image_file import Encoding
from sdbatch.output.plan import Plan
from sdbatch.schema import Shard
from sdbatch.stages.draw import DrawImages, Draws
from sdbatch.stages.read import ReadPrompts
from sdbatch.stages.write import WriteShard
from sdbatch.storage import Store

if TYPE_CHECKING:
    from ray.data import Dataset

MakeEngine = Callable[[], Draws]
ONE: dict[str, Any] = {"batch_size": 1, "batch_format": "pyarrow"}  # a block of one row: a shard


@dataclass(frozen=True)
class Drawing:
    """Who draws, how images are encoded, and who is told of it."""

    pool: Pool
    make_engine: MakeEngine
    encoding: Encoding
    watch: RemoteWatch
    monitor: Monitor


def graph(planned: Plan, todo: Sequence[Shard], store: Store, drawing: Drawing) -> "Dataset":
    """Lay out the data flow: shards -> ReadPrompts -> DrawImages -> WriteShard -> receipts."""
    import ray.data
    from ray.data import ActorPoolStrategy, TaskPoolStrategy

    job, table, monitor = planned.job, planned.table, drawing.monitor
    cpus, _ = pool.per_actor(job.cluster, job.engine)
    images, lanes = sum(shard.images for shard in todo), pool.most_lanes(job.engine)
    in_flight = pool.in_flight(drawing.pool.most, len(todo), images, lanes)
    read = ReadPrompts(job, table.columns, table.schema, table.extras, monitor)
    draw = {
        "make_engine": drawing.make_engine,
        "encoding": drawing.encoding,
        "watch": drawing.watch,
        "encoders": max(1, int(cpus)),
        "policy": job.safety.policy,
        "monitor": monitor,
    }
    strategy = ActorPoolStrategy(
        min_size=drawing.pool.least,
        max_size=drawing.pool.most,
        initial_size=drawing.pool.most,  # asked for at once: an autoscaler sees all of them
        max_tasks_in_flight_per_actor=in_flight,
        max_concurrent_calls_per_actor=in_flight,
    )
    on = pool.options(job.cluster, job.engine)
    alone = {"num_cpus": pool.CUT_CPUS, "compute": TaskPoolStrategy(size=1)}
    write = WriteShard(job.output, store, monitor)
    with ray_setup.settings():
        return (
            ray.data.from_arrow(list(windows(todo, planned.urls())))
            .map_batches(one_by_one, batch_size=None, batch_format="pyarrow", **alone)
            .map_batches(read, num_cpus=pool.READ_CPUS, **ONE)
            .map_batches(DrawImages, fn_constructor_kwargs=draw, compute=strategy, **on, **ONE)
            .map_batches(write, num_cpus=pool.WRITE_CPUS, **ONE)
        )


def windows(shards: Sequence[Shard], urls: dict[str, str]) -> Iterator[pa.Table]:
    """Yield the shards with their files' URLs, in blocks so large that Ray holds few of them."""
    for at in range(0, len(shards), pool.WINDOW):
        yield pa.Table.from_pylist(
            [{**asdict(s), "url": urls[s.source]} for s in shards[at : at + pool.WINDOW]]
        )


def one_by_one(window: pa.Table) -> pa.Table:
    """Hand on a window of the plan; Ray cuts it into blocks of one row, see ray_setup.settings."""
    return window

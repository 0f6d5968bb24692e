"""The data flow that Ray Data runs: windows of the plan, then one stage after the other."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from sdbatch.batch import pool, ray_setup
from sdbatch.batch.blocks import BlockStage
from sdbatch.batch.drawing_actor import DrawingActor
from sdbatch.batch.liveness import LivenessClient
from sdbatch.batch.metrics import Metrics
from sdbatch.batch.pool import Pool
from sdbatch.job import Job
from sdbatch.output.image_file import encoding_of
from sdbatch.output.plan import Plan
from sdbatch.output.receipts import Writer
from sdbatch.resolve import MakeEngine
from sdbatch.schema import Shard
from sdbatch.stages.base import Needs, Stage, added_columns, job_stages
from sdbatch.stages.draw import DrawImages
from sdbatch.stages.read import ReadPrompts
from sdbatch.stages.safety import ApplySafety, SafetyPolicy
from sdbatch.stages.write import WriteShard

if TYPE_CHECKING:
    from ray.data import Dataset

WINDOW = 64  # shards of the plan in one block: with a block each Ray would take long to begin
# Of tables without pictures. Tasks take no CPU, so nothing else limits their number. One reads as
# fast as many actors draw, and each further one is a process whose imports delay the first image.
ACTORS_PER_READER = 4
_WINDOW = "window"  # the column of a block that holds a window, as an Arrow stream
ONE: dict[str, Any] = {"batch_size": 1, "batch_format": "pyarrow"}  # a block of one row: a shard


@dataclass(frozen=True)
class ActorSetup:
    """How the actors of a run are set up, and where they report."""

    pool: Pool
    in_flight: int  # shards that an actor draws at a time
    liveness: LivenessClient
    metrics: Metrics


def stages_of(
    job: Job, planned: Plan, writer: Writer, make_engine: MakeEngine, actor: Needs
) -> list[Stage]:
    """Return the stages of a resolved job, in the order that they run.

    Args:
        job: resolved.
        planned: its plan.
        writer: of this run.
        make_engine: makes the engine of an actor.
        actor: what an actor needs, from pool.needs.
    """
    encoding = encoding_of(job)
    policy = SafetyPolicy(job.safety.policy)
    return [
        ReadPrompts(job, planned.table),
        DrawImages(make_engine, encoding, max(1, int(actor.cpus)), actor, job.draw_again),
        *([] if policy.policy == "flag" else [ApplySafety(policy, encoding)]),
        *job_stages(job),
        WriteShard(job.output, writer, added_columns(job)),
    ]


def lay_out(
    todo: Sequence[Shard], urls: dict[str, str], stages: Sequence[Stage], setup: ActorSetup
) -> "Dataset":
    """Lay out the data flow: the shards of the plan through all stages, to their receipts.

    Args:
        todo: the shards.
        urls: of the table's files, by name.
        stages: from stages_of.
        setup: of the actors that draw.
    """
    import ray.data
    from ray.data import TaskPoolStrategy

    read, *others = stages
    actors = setup.pool.most
    readers = count_readers(read, actors)
    with ray_setup.settings():
        # not from_arrow, which starts a process to look at the blocks before anything else begins
        items = [{_WINDOW: to_bytes(window)} for window in windows(todo, urls, readers)]
        flow = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            ReadWindow(BlockStage(read, setup.metrics)),
            compute=TaskPoolStrategy(size=min(readers, len(items))),
            batch_size=None,
            batch_format="pyarrow",
            **pool.ray_options(read.needs),
        )
        for stage in others:
            flow = flow.map_batches(
                **_call(stage, setup, min(actors, len(todo))),
                **pool.ray_options(stage.needs),
                **ONE,
            )
        return flow


def _call(stage: Stage, setup: ActorSetup, tasks: int) -> dict[str, Any]:
    """Return what Ray Data calls for a stage: tasks, or actors for the stage that draws."""
    from ray.data import ActorPoolStrategy, TaskPoolStrategy

    if not isinstance(stage, DrawImages):
        return {"fn": BlockStage(stage, setup.metrics), "compute": TaskPoolStrategy(size=tasks)}
    actors = ActorPoolStrategy(
        min_size=setup.pool.least,
        max_size=setup.pool.most,
        initial_size=setup.pool.most,  # requested at once: an autoscaler sees all of them
        max_tasks_in_flight_per_actor=setup.in_flight,
        max_concurrent_calls_per_actor=setup.in_flight,
    )
    arguments = (stage, setup.liveness, setup.metrics)
    return {"fn": DrawingActor, "fn_constructor_args": arguments, "compute": actors}


def count_readers(read: Stage, actors: int) -> int:
    """Return how many tasks read at a time: more where they fetch and decode pictures."""
    has_pictures = isinstance(read, ReadPrompts) and read.has_pictures
    return actors if has_pictures else math.ceil(actors / ACTORS_PER_READER)


def windows(shards: Sequence[Shard], urls: dict[str, str], readers: int) -> Iterator[pa.Table]:
    """Yield the shards with the URLs of their files, at most WINDOW in a block, for `readers`."""
    size = min(WINDOW, math.ceil(len(shards) / readers))
    for at in range(0, len(shards), size):
        yield pa.Table.from_pylist(
            [{**asdict(s), "url": urls[s.source]} for s in shards[at : at + size]]
        )


class ReadWindow:
    """Reads the shards of a window, one after the other; Ray requests the next one when it may."""

    def __init__(self, read: BlockStage) -> None:
        self._read = read

    def __call__(self, block: pa.Table) -> Iterator[pa.Table]:
        """Yield the block of each shard of the window in `block`."""
        window = pa.ipc.open_stream(block[_WINDOW][0].as_buffer()).read_all()
        for at in range(window.num_rows):
            yield self._read(window.slice(at, 1))


def to_bytes(window: pa.Table) -> bytes:
    """Return a window as an Arrow stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, window.schema) as stream:
        stream.write_table(window)
    return bytes(sink.getvalue())

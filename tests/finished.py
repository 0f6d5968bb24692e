"""An output made without Ray: the stages called by hand, with the fake engine."""

import asyncio
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from sdbatch import schema
from sdbatch.batch.blocks import BlockStage, pack, unpack
from sdbatch.batch.drawing_actor import DrawingActor
from sdbatch.batch.liveness import Liveness, LivenessClient
from sdbatch.batch.metrics import Metrics
from sdbatch.job import Job
from sdbatch.output import identity, lease, lifecycle, names, receipts
from sdbatch.output.image_file import Encoding, encoding_of
from sdbatch.output.plan import Plan, make_plan
from sdbatch.output.receipts import Receipt, Writer
from sdbatch.output.record import proof_of
from sdbatch.prompts.table import open_table
from sdbatch.report.card import dataset_card
from sdbatch.report.closing import Report
from sdbatch.report.gallery import gallery_page
from sdbatch.sampling import Sampling
from sdbatch.schema import Shard
from sdbatch.stages.base import Stage, added_columns, job_stages, with_shard
from sdbatch.stages.draw import DrawImages
from sdbatch.stages.read import ReadPrompts
from sdbatch.stages.safety import ApplySafety, SafetyPolicy
from sdbatch.stages.write import WriteShard
from sdbatch.storage import Store
from tests.fakes import FakeEngine

SIDE = 8  # pixels
HERE = "here"
PROMPTS = (
    "a red dog",
    "fail",
    "a <b>blue</b> cat & 'mouse'",
    "fail",
    "a green bird",
    "二匹の猫 🐈",
)


class Result:
    """A result that may be awaited, as Ray's references are."""

    def __init__(self, value) -> None:
        self.value = value

    def __await__(self):
        yield from ()
        return self.value


class LocalLiveness(LivenessClient):
    """A run's Liveness in this process, for several threads, on the node HERE.

    Without a number of actors there is no driver that lets them draw: they may at once.
    """

    def __init__(self, actors: int | None = None) -> None:
        self.state = Liveness(actors or 1)
        self._lock = threading.Lock()
        if actors is None:
            self.state.open()

    def _node(self):
        return HERE

    def living_nodes(self):
        return {HERE}

    def _call(self, method, *arguments):
        with self._lock:
            return Result(getattr(self.state, method)(*arguments))

    def _wait(self, result, seconds=None):
        return result.value


@dataclass(frozen=True)
class Finished:
    """A finished output and what led to it."""

    store: Store
    plan: Plan
    receipts: list[Receipt]
    report: Report

    @property
    def folder(self) -> Path:
        return Path(self.store.url)


def encoding(image_format: str = "jpg") -> Encoding:
    return Encoding(image_format, 90, "a-model", "0123456789abcdef", "sdbatch 0")


def requests(prompts=PROMPTS, shard=0, errors=None, **extras) -> pa.Table:
    """Return what ReadPrompts makes of `prompts`; `extras` are whole columns, `errors` by index."""
    rows = [
        {
            **Sampling().model_dump(),
            "key": schema.key(shard, index),
            "prompt": prompt,
            "negative_prompt": "blurred",
            "seed": 1000 * shard + index,
            "num_inference_steps": 4,
            "guidance_scale": 7.5,
            "sampler": "ddim",
            "height": SIDE,
            "width": SIDE,
            "row_key": str(index),
            "sample_index": 0,
            "error": (errors or {}).get(index),
        }
        for index, prompt in enumerate(prompts)
    ]
    table = pa.Table.from_pylist(rows, schema.requests(pa.schema([])))
    for name, column in extras.items():
        table = table.append_column(name, column)
    return table


def block(prompts=PROMPTS, shard=0, **options) -> pa.Table:
    rows = requests(prompts, shard, **options)
    return pack(with_shard(rows, planned(shard, rows.num_rows)))


def planned(shard: int, images: int = 1) -> Shard:
    """Return a row of a plan."""
    return Shard(shard, "table.txt", "0123456789abcdef", 0, 0, images)


def writer(store: Store) -> Writer:
    """Return what commits shards of a run that owns the output from now on."""
    return Writer(lease.take(store), "0123456789abcdef")


def drawing_actor(make_engine=FakeEngine, image_format="jpg", liveness=None) -> DrawingActor:
    """Return the drawing stage as Ray Data runs it, in this process."""
    stage = DrawImages(make_engine, encoding(image_format))
    return DrawingActor(stage, liveness or LocalLiveness(), Metrics())


def draw(*blocks, engine=FakeEngine, image_format="jpg", liveness=None) -> list[pa.Table]:
    """Draw the shards in `blocks`, all at once, with one engine."""
    return at_once(drawing_actor(engine, image_format, liveness), blocks)


def at_once(stage, blocks) -> list[pa.Table]:
    """Call the draw stage with all `blocks` at the same time."""

    async def call() -> list[pa.Table]:
        return await asyncio.wait_for(asyncio.gather(*map(stage, blocks)), timeout=30)

    return asyncio.run(call())


def draw_rows(*blocks, **options) -> list[pa.Table]:
    """Draw as `draw` does; return the shards' tables, with the columns of schema.failed."""
    tables = [unpack(drawn) for drawn in draw(*blocks, **options)]
    return [
        rows.select(schema.failed(schema.extras_of(rows.schema)).names).replace_schema_metadata()
        for rows in tables
    ]


def drawn(prompts=("a red dog", "a 'blue' \"cat\"", "二匹の猫 🐈"), image_format="jpg", **extras):
    """Return a shard's table as the formats write it, with the columns of schema.images."""
    (rows,) = draw_rows(block(prompts, **extras), image_format=image_format)
    return rows.drop_columns(["error"])


def read_stage(job: Job) -> tuple[Plan, ReadPrompts, list[pa.Table]]:
    """Plan `job`; return the plan, the stage that reads its shards, and the stage's blocks."""
    table = open_table(job.prompts, added_columns(job).names)
    planned = make_plan(job, table, None)
    urls = planned.urls()
    blocks = [{**asdict(shard), "url": urls[shard.source]} for shard in planned.shards]
    stage = ReadPrompts(planned.job, table)
    return planned, stage, [pa.Table.from_pylist([row]) for row in blocks]


def finish(job: Job, engine=FakeEngine) -> Finished:
    """Draw all of `job` into its output and end it; `engine` makes the engine that draws."""
    store = Store(job.output.path)
    plan, read, blocks = read_stage(job)
    job, metrics = plan.job, Metrics()
    held = lease.take(store)
    lifecycle.begin(store, plan, job, [])
    fingerprint = identity.fingerprint(job, identity.versions())
    draw_images = DrawingActor(
        DrawImages(engine, encoding_of(job), again=job.draw_again), LocalLiveness(), metrics
    )
    policy = SafetyPolicy(job.safety.policy)
    after: list[Stage] = [ApplySafety(policy, encoding_of(job)), *job_stages(job)]
    after.append(WriteShard(job.output, Writer(held, fingerprint), added_columns(job)))
    every = []
    for shard in at_once(draw_images, map(BlockStage(read, metrics), blocks)):
        for stage in after:
            shard = BlockStage(stage, metrics)(shard)
        every += receipts.from_table(shard)
    report = Report(
        output=store.url,
        planned=plan.images,
        images=sum(receipt.images for receipt in every),
        failed=sum(receipt.failed for receipt in every),
        reasons=receipts.count_reasons(every),
        drawn_now=sum(receipt.images for receipt in every),
        seconds=1.0,
        images_per_s=1.0,
        began=0.0,
        from_pictures=sum(receipt.facts["from_pictures"] for receipt in every),
    )
    pages = {
        names.GALLERY: lambda: gallery_page(store, job, every),
        names.CARD: lambda: dataset_card(job, report).encode(),
    }
    lifecycle.end(store, proof_of(job, fingerprint, plan.shards), every, pages)
    held.release("finished")
    return Finished(store, plan, every, report)


def small_job(make_job, folder: Path, table=PROMPTS, **sections) -> Job:
    """Return a job of small images, two a shard, over `table`: its prompts, or all of it."""
    if isinstance(table, pa.Table):
        path = folder / "table.parquet"
        pq.write_table(table, path)
    else:
        path = folder / "table.txt"
        path.write_text("".join(f"{prompt}\n" for prompt in table), encoding="utf-8")
    sections["prompts"] = {"path": str(path), **sections.get("prompts", {})}
    sections["output"] = {"images_per_shard": 2, **sections.get("output", {})}
    return make_job(sampling={"height": SIDE, "width": SIDE}, **sections)

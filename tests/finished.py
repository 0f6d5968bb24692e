"""An output made without Ray: the three stages called by hand, with the fake engine."""

import asyncio
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from sdbatch import schema
from sdbatch.batch import pipeline
from sdbatch.batch.liveness import Watch
from sdbatch.engine.request import Usage
from sdbatch.job import Job
from sdbatch.output import lifecycle, plan, receipts
from sdbatch.output.image_file import Encoding
from sdbatch.output.plan import Plan
from sdbatch.output.receipts import Receipt
from sdbatch.prompts.table import open_table
from sdbatch.report.closing import Report
from sdbatch.stages.draw import DrawImages
from sdbatch.stages.read import ReadPrompts
from sdbatch.stages.write import WriteShard
from sdbatch.storage import Store
from tests.fakes import FakeEngine

SIDE = 8  # pixels
PROMPTS = (
    "a red dog",
    "fail",
    "a <b>blue</b> cat & 'mouse'",
    "fail",
    "a green bird",
    "二匹の猫 🐈",
)


class HereWatch:
    """The run's watch in this process, as the draw stage calls it."""

    def __init__(self, actors: int = 1) -> None:
        self.watch = Watch(actors)
        self.loading, self.loaded = self.watch.loading, self.watch.loaded
        self.refused = self.watch.refused

    async def deaths(self, shard: int) -> int:
        return self.watch.deaths(shard)

    async def begin(self, shard: int, images: int) -> None:
        self.watch.begin(shard)

    async def beat(self, shard: int, drawn: int, failed: int, usage: Usage) -> bool:
        return self.watch.beat(shard, drawn, failed, usage.ticks)

    async def end(self, shard: int, drawn: int, failed: int) -> None:
        self.watch.end(shard, drawn, failed)


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
    return schema.pack(shard, requests(prompts, shard, **options), "{}")


def draw(*blocks, engine=FakeEngine, image_format="jpg", watch=None) -> list[pa.Table]:
    """Draw the shards in `blocks`, all at once, with one engine."""

    return at_once(DrawImages(engine, encoding(image_format), watch or HereWatch()), blocks)


def at_once(stage, blocks) -> list[pa.Table]:
    """Call the draw stage with all `blocks` at the same time."""

    async def call() -> list[pa.Table]:
        return await asyncio.wait_for(asyncio.gather(*map(stage, blocks)), timeout=30)

    return asyncio.run(call())


def draw_rows(*blocks, **options) -> list[pa.Table]:
    """Draw as `draw` does; return the shards' tables, with the columns of schema.failed."""
    return [schema.unpack(drawn)[1] for drawn in draw(*blocks, **options)]


def drawn(prompts=("a red dog", "a 'blue' \"cat\"", "二匹の猫 🐈"), image_format="jpg", **extras):
    """Return a shard's table as the formats write it, with the columns of schema.images."""
    (rows,) = draw_rows(block(prompts, **extras), image_format=image_format)
    return rows.drop_columns(["error"])


def read_stage(job: Job) -> tuple[Plan, ReadPrompts, list[pa.Table]]:
    """Plan `job`; return the plan, the stage that reads its shards, and the stage's blocks."""
    table = open_table(job.prompts)
    planned = plan.make(job, table, None)
    urls = planned.urls()
    stage = ReadPrompts(planned.job, table.columns, table.schema, table.extras)
    blocks = [{**asdict(shard), "url": urls[shard.source]} for shard in planned.shards]
    return planned, stage, [pa.Table.from_pylist([row]) for row in blocks]


def finish(job: Job, engine=FakeEngine) -> Finished:
    """Draw all of `job` into its output and end it; `engine` makes the engine that draws."""
    store = Store(job.output.path)
    planned, read, blocks = read_stage(job)
    lifecycle.begin(store, planned, [], [], overwrite=False)
    draw_images = DrawImages(engine, pipeline.encoding(planned.job), HereWatch())
    write = WriteShard(planned.job.output, store)
    drawn_blocks = at_once(draw_images, map(read, blocks))
    every = [receipts.from_table(write(shard))[0] for shard in drawn_blocks]
    report = Report(
        output=store.url,
        planned=planned.images,
        images=sum(receipt.images for receipt in every),
        failed=sum(receipt.failed for receipt in every),
        reasons=receipts.reasons(every),
        drawn_now=sum(receipt.images for receipt in every),
        seconds=1.0,
        images_per_s=1.0,
        began=0.0,
    )
    lifecycle.end(store, planned.job, every, report)
    return Finished(store, planned, every, report)


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

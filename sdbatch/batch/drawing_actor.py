"""The drawing stage as Ray Data runs it: an actor that reports progress and isolates suspects."""

import asyncio
import os
import socket
import time
from dataclasses import asdict

import pyarrow as pa

from sdbatch import schema
from sdbatch.batch.blocks import carry_on, pack, unpack
from sdbatch.batch.gate import Gate
from sdbatch.batch.liveness import LivenessClient
from sdbatch.batch.metrics import Metrics
from sdbatch.errors import ModelError, SdbatchError
from sdbatch.stages.base import replace_columns, shard_of, with_shard
from sdbatch.stages.draw import DrawImages, Drawing

MOST_ATTEMPTS = 3  # a shard during which so many actors died is recorded as failed
HEARTBEAT_SECONDS = 0.5
FIRST_HEARTBEAT_SECONDS = 0.1  # until the actor has drawn an image


class DrawingActor:
    """Draws shards with one engine; its calls run concurrently and share it."""

    def __init__(self, stage: DrawImages, liveness: LivenessClient, metrics: Metrics) -> None:
        liveness.loading()
        try:
            stage.open()
        except SdbatchError as error:
            liveness.rejected(str(error))
            raise
        self._stage = stage
        self._liveness = liveness
        self._metrics = metrics
        self._gate = Gate()
        self._drawings: dict[int, _Counts] = {}  # shard -> its images
        self._drew = False
        liveness.loaded()

    async def __call__(self, block: pa.Table) -> pa.Table:
        """Draw the shard in `block`."""
        rows = unpack(block)
        shard = shard_of(rows)
        deaths = await self._liveness.deaths(shard)
        attempt = deaths + 1
        if deaths >= MOST_ATTEMPTS:
            attempt = deaths  # this is not another attempt
            rows = _fail_all(rows, f"Drawing this shard killed the actor {deaths} times.")
        # A shard that was being drawn when its actor died is drawn alone: another shard may have
        # caused the death, and the next one must be attributed to the right shard.
        async with self._gate.alone() if deaths else self._gate.among_others():
            with self._metrics.stage(
                self._stage.name, shard, f"{rows.num_rows} rows, attempt {attempt}"
            ):
                return await self._draw(shard, rows, attempt)

    async def _draw(self, shard: int, rows: pa.Table, attempt: int) -> pa.Table:
        await self._liveness.begin(shard)
        began = time.time()
        drawing = self._stage.new_drawing(rows)
        self._drawings[shard] = _Counts(drawing, rows.num_rows)
        beats = asyncio.ensure_future(self._beat(shard, drawing))
        try:
            drawing.start(self._stage.engine)
            results = await asyncio.wrap_future(drawing.done)
        finally:
            beats.cancel()
            await self._report(shard, drawing)
            del self._drawings[shard]
            await self._liveness.end(shard, drawing.drawn, drawing.failed)
        facts = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "began": _clock(began),
            "ended": _clock(time.time()),
            "attempt": attempt,
            "lanes": drawing.lanes,
            "engine": asdict(self._stage.engine.usage),  # of the actor, since it began
        }
        drawn = with_shard(drawing.with_results(results), shard, facts)
        return pack(carry_on(self._stage, rows, drawn))

    async def _beat(self, shard: int, drawing: Drawing) -> None:
        going = True
        while going:
            await asyncio.sleep(HEARTBEAT_SECONDS if self._drew else FIRST_HEARTBEAT_SECONDS)
            going = await self._report(shard, drawing)
        drawing.give_up(ModelError("The run has stopped, so this shard is not finished."))

    async def _report(self, shard: int, drawing: Drawing) -> bool:
        """Report how far a shard is; return whether the run goes on."""
        drawn, failed = self._drawings[shard].new()
        self._drew |= drawn > 0
        self._metrics.images(drawn=drawn, failed=failed)
        usage = self._stage.engine.usage
        queue = sum(counts.open for counts in self._drawings.values())
        self._metrics.engine(usage, queue)
        return await self._liveness.beat(shard, drawing.drawn, drawing.failed, usage.ticks)


class _Counts:
    """The images of a shard in flight, and how many of them are in the metrics already."""

    def __init__(self, drawing: Drawing, images: int) -> None:
        self._drawing = drawing
        self._images = images
        self._drawn = self._failed = 0

    @property
    def open(self) -> int:
        """Return how many are still to be drawn."""
        return self._images - self._drawing.drawn - self._drawing.failed

    def new(self) -> tuple[int, int]:
        """Return how many were drawn and failed since the last call."""
        before = self._drawn, self._failed
        self._drawn, self._failed = self._drawing.drawn, self._drawing.failed
        return self._drawn - before[0], self._failed - before[1]


def _fail_all(rows: pa.Table, reason: str) -> pa.Table:
    errors = [error or reason for error in rows["error"].to_pylist()]
    return replace_columns(rows, {"error": pa.array(errors, schema.ERROR.type)})


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))

"""The drawing stage as Ray Data runs it: an actor that reports progress and isolates suspects."""

import asyncio
import os
import socket
import time
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from sdbatch.batch.blocks import carry_on, pack, unpack
from sdbatch.batch.gate import Gate
from sdbatch.batch.isolation import IsolatedDrawing
from sdbatch.batch.liveness import LivenessClient
from sdbatch.batch.metrics import Metrics
from sdbatch.engine.request import Usage
from sdbatch.errors import ModelError, SdbatchError
from sdbatch.schema import shard_name
from sdbatch.stages.base import shard_of, with_shard
from sdbatch.stages.draw import DrawImages, Drawing, add_results, request_rows

MOST_DEATHS = 10  # of actors during one shard, which no row explains; then the run stops
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
        self._children: dict[int, Usage] = {}  # child process -> what its engine has done
        self._drew = self._open = False
        liveness.loaded()

    async def __call__(self, block: pa.Table) -> pa.Table:
        """Draw the shard in `block`."""
        if not self._open:
            await self._liveness.wait_until_open()
            self._open = True
        rows = unpack(block)
        shard = shard_of(rows).shard
        deaths = await self._liveness.deaths(shard)
        if deaths >= MOST_DEATHS:
            raise ModelError(
                f"Shard {shard_name(shard)}: {deaths} drawing actors died during it, but no row of "
                f"it is the cause, as the rows were drawn in another process. Find the cause in "
                f"the logs of Ray and the machine, for example a lack of memory. Then run the same "
                f"command again to resume."
            )
        # A shard that was being drawn when its actor died is drawn alone, in a child process: the
        # cause may be one of its rows, another shard's, or nothing in this run.
        async with self._gate.alone() if deaths else self._gate.among_others():
            attempt = await self._liveness.begin(shard)
            details = f"{rows.num_rows} rows, attempt {attempt}{', isolated' if deaths else ''}"
            with self._metrics.stage(self._stage.name, shard, details):
                return await self._draw(shard, rows, attempt, isolated=deaths > 0)

    async def _draw(self, shard: int, rows: pa.Table, attempt: int, *, isolated: bool) -> pa.Table:
        began = time.time()
        drawing = self._new_drawing(rows, isolated)
        self._drawings[shard] = _Counts(drawing, rows.num_rows)
        beats = asyncio.ensure_future(self._beat(shard, drawing))
        try:
            drawing.start()
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
            "decoded_again": sum(bool(result.get("decoded_again")) for result in results),
            "from_pictures": _count_from_pictures(rows, results),
            "engine": asdict(self._usage()),  # of the actor, since it began
            "device": dict(self._stage.engine.device),
            **({"isolated": True} if isolated else {}),
        }
        drawn = with_shard(add_results(rows, results), shard_of(rows), facts)
        return pack(carry_on(self._stage, rows, drawn))

    def _new_drawing(self, rows: pa.Table, isolated: bool) -> Drawing | IsolatedDrawing:
        if not isolated:
            return self._stage.new_drawing(request_rows(rows))
        if self._stage.needs.gpus:
            from sdbatch.engine import cuda

            cuda.release_cached_memory()  # the child's engine is on the same GPU
        return IsolatedDrawing(self._stage, request_rows(rows), self._children)

    def _usage(self) -> Usage:
        """Return what the actor's engine and those of its child processes have done."""
        return sum(list(self._children.values()), self._stage.engine.usage)

    async def _beat(self, shard: int, drawing: Drawing | IsolatedDrawing) -> None:
        going = True
        while going:
            await asyncio.sleep(HEARTBEAT_SECONDS if self._drew else FIRST_HEARTBEAT_SECONDS)
            going = await self._report(shard, drawing)
        drawing.give_up(ModelError("The run has stopped, so this shard is not finished."))

    async def _report(self, shard: int, drawing: Drawing | IsolatedDrawing) -> bool:
        """Report how far a shard is; return whether the run goes on."""
        drawn, failed = self._drawings[shard].new()
        self._drew |= drawn > 0
        self._metrics.images(drawn=drawn, failed=failed)
        usage = self._usage()
        queue = sum(counts.open for counts in self._drawings.values())
        self._metrics.engine(usage, queue)
        return await self._liveness.beat(shard, drawing.drawn, drawing.failed, usage.ticks)


class _Counts:
    """The images of a shard in flight, and how many of them are in the metrics already."""

    def __init__(self, drawing: Drawing | IsolatedDrawing, images: int) -> None:
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


def _count_from_pictures(rows: pa.Table, results: list[dict[str, Any]]) -> int:
    """Return how many images were drawn from a picture."""
    pictured = rows["image_sha256"].is_valid().to_pylist()
    return sum(
        bool(picture and result["error"] is None)
        for picture, result in zip(pictured, results, strict=True)
    )


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))

"""Second stage, in an actor beside its engine: requests to encoded images.

Calls run at the same time, so that the shards in flight share the engine and its batches stay
full across shards. Images are encoded in threads, beside the engine's.
"""

import asyncio
import hashlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from sdbatch import schema
from sdbatch.batch.metrics import NOBODY, Monitor
from sdbatch.engine.request import Drawn, Request, Usage
from sdbatch.errors import ModelError, SdbatchError
from sdbatch.job import EngineSettings
from sdbatch.models.find_model import ModelFiles
from sdbatch.output.image_file import Encoding, encode
from sdbatch.stages.gate import Gate

MOST_ATTEMPTS = 3  # a shard that has killed its actor so often is recorded as failed
HEARTBEAT_SECONDS = 0.5


class Draws(Protocol):
    """What the stage needs of an engine; engine.Engine is one, the tests' fake engine another."""

    @property
    def usage(self) -> Usage:
        """Return what the engine has done so far."""

    def submit(self, request: Request) -> Future[Drawn]:
        """Queue a request."""


class Watch(Protocol):
    """Where the stage says what it does; it outlives the actor (watch.py has it)."""

    def loading(self) -> None:
        """An actor begins to load its engine. Raises ModelError if too many died of that."""

    def loaded(self) -> None:
        """An actor's engine is ready."""

    def refused(self, reason: str) -> None:
        """An actor's engine cannot be loaded, and will not be on another try."""

    async def deaths(self, shard: int) -> int:
        """Return how often drawing of `shard` began and never ended: its actor died."""

    async def begin(self, shard: int, images: int) -> None:
        """Drawing of the `images` of `shard` begins."""

    async def beat(self, shard: int, drawn: int, failed: int, usage: Usage) -> bool:
        """So many are drawn or failed by now, with so much work; returns if the run goes on."""

    async def end(self, shard: int, drawn: int, failed: int) -> None:
        """Drawing of `shard` ended, however."""


def load_engine(
    files: ModelFiles, settings: EngineSettings, pixels: int, example: Request | None
) -> Draws:
    """Load the model and start an engine.

    Args:
        files: of the model.
        settings: resolved; its lanes may depend on the GPU that this process has.
        pixels: of the job's images, which the lanes are meant for.
        example: what every row asks for that has no columns of its own.

    Raises:
        ModelError: the model cannot be loaded, or not draw the example.
    """
    from sdbatch.engine import cuda
    from sdbatch.engine.engine import Engine  # here: the driver imports this module, without torch
    from sdbatch.models.sd1.loading import Build, load

    build = Build(
        settings.device, settings.dtype, bool(settings.channels_last), bool(settings.compile)
    )
    lanes = settings.lanes
    count = cuda.lanes(lanes, cuda.name(build.device)) if isinstance(lanes, dict) else int(lanes)
    engine = Engine(load(files, build), lanes=count, threads=settings.threads, pixels=pixels)
    if example is not None:
        try:
            engine.check(example)
        except Exception as error:
            text = " ".join(str(error).split()).rstrip(".")
            raise ModelError(f"sampling: this model cannot draw it: {text}.") from error
    return engine


class DrawImages:
    """Draws shards with one engine. No row is lost: one that fails leaves with its `error`."""

    def __init__(
        self,
        make_engine: Callable[[], Draws],
        encoding: Encoding,
        watch: Watch,
        encoders: int = 1,
        policy: str = "flag",
        monitor: Monitor = NOBODY,
    ) -> None:
        watch.loading()
        try:
            self._engine = make_engine()
        except SdbatchError as error:
            watch.refused(str(error))
            raise
        self._encoding = encoding
        self._policy = policy
        self._encoders = ThreadPoolExecutor(encoders, "sdbatch-encode")
        self._watch = watch
        self._monitor = monitor
        self._gate = Gate()
        watch.loaded()

    async def __call__(self, block: pa.Table) -> pa.Table:
        """Draw the shard in `block`; returns it with the columns of schema.failed."""
        shard, rows, _ = schema.unpack(block)
        deaths = await self._watch.deaths(shard)
        attempt = deaths + 1
        if deaths >= MOST_ATTEMPTS:
            attempt = deaths  # there is no other
            rows = _fail_all(rows, f"drawing its shard killed the actor {deaths} times")
        # A shard that was being drawn when its actor died gets no company: the death may have
        # been another's doing, and the next one must be laid at the right door.
        async with self._gate.alone() if deaths else self._gate.among_others():
            with self._monitor.stage("draw", shard, f"{rows.num_rows} rows, attempt {attempt}"):
                return await self._draw(shard, rows, attempt)

    async def _draw(self, shard: int, rows: pa.Table, attempt: int) -> pa.Table:
        await self._watch.begin(shard, rows.num_rows)
        began = time.time()
        drawing = _Drawing(rows.to_pylist(), self._encoding, self._policy, self._encoders)
        beats = asyncio.ensure_future(self._beat(shard, drawing))
        try:
            drawing.start(self._engine)
            results = await asyncio.wrap_future(drawing.done)
        finally:
            beats.cancel()
            await self._watch.beat(shard, drawing.drawn, drawing.failed, self._engine.usage)
            await self._watch.end(shard, drawing.drawn, drawing.failed)
        facts = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "began": _clock(began),
            "ended": _clock(time.time()),
            "attempt": attempt,
            "lanes": drawing.lanes,
            "engine": asdict(self._engine.usage),  # of the actor, since it began
        }
        return schema.pack(shard, _with_results(rows, results), json.dumps(facts))

    async def _beat(self, shard: int, drawing: "_Drawing") -> None:
        going = True
        while going:
            await asyncio.sleep(HEARTBEAT_SECONDS)
            usage = self._engine.usage
            going = await self._watch.beat(shard, drawing.drawn, drawing.failed, usage)
        drawing.give_up(ModelError("run = stopped: this shard is given up."))


class _Drawing:
    """The rows of one shard on their way through the engine and the encoders.

    Callbacks and threads, and one future for the shard: an asyncio task for each row would cost
    as much as encoding its image.
    """

    def __init__(
        self,
        rows: list[dict[str, Any]],
        encoding: Encoding,
        policy: str,
        encoders: ThreadPoolExecutor,
    ) -> None:
        self.drawn = 0
        self.failed = 0
        self.lanes: dict[int, int] = {}  # lanes of the batch -> images that were drawn in so many
        self.done: Future[list[dict[str, Any]]] = Future()  # what came of each row, in order
        self._rows = rows
        self._encoding = encoding
        self._policy = policy
        self._encoders = encoders
        self._results: list[dict[str, Any]] = [{}] * len(rows)
        self._left = len(rows)
        self._lock = threading.Lock()

    def start(self, engine: Draws) -> None:
        """Submit the rows that can be drawn."""
        for index, row in enumerate(self._rows):
            if row["error"] is not None:
                self._finish(index, {"error": row["error"]})
            else:
                request = Request(**{field.name: row[field.name] for field in schema.SAMPLING})
                engine.submit(request).add_done_callback(partial(self._encode_later, index))

    def give_up(self, error: Exception) -> None:
        """End the shard with `error`, which is no fault of a row."""
        with self._lock:
            if not self.done.done():
                self.done.set_exception(error)

    def _encode_later(self, index: int, drawn: Future[Drawn]) -> None:
        self._encoders.submit(self._encode, index, drawn)  # out of the engine's own thread

    def _encode(self, index: int, future: Future[Drawn]) -> None:
        row = self._rows[index]
        try:
            drawn = future.result()
            blank = drawn.nsfw and self._policy == "blank"
            image = np.zeros_like(drawn.image) if blank else drawn.image
            file = encode(image, row, self._encoding)
        except SdbatchError as error:
            self.give_up(error)  # the engine cannot go on
        except Exception as error:  # noqa: BLE001  of this row alone, found by drawing it alone
            text = " ".join(str(error).split())
            self._finish(index, {"error": f"{type(error).__name__}: {text}"})
        else:
            result = {
                "image": {"bytes": file, "path": f"{row['key']}.{self._encoding.image_format}"},
                "prompt_tokens": drawn.prompt_tokens,
                "prompt_truncated": drawn.prompt_truncated,
                "nsfw": drawn.nsfw,
                "nsfw_scores": drawn.nsfw_scores,
                "sha256": hashlib.sha256(file).hexdigest(),
                "error": None,
            }
            with self._lock:
                self.lanes[drawn.lanes] = self.lanes.get(drawn.lanes, 0) + 1
            if drawn.nsfw and self._policy == "drop":
                worst = max(drawn.nsfw_scores or ())
                result = {"error": f"safety = nsfw by {worst:.3f}: dropped, as safety.policy says"}
            self._finish(index, result)

    def _finish(self, index: int, result: dict[str, Any]) -> None:
        with self._lock:
            self._results[index] = result
            self._left -= 1
            self.failed += result["error"] is not None
            self.drawn += result["error"] is None
            if not self._left and not self.done.done():
                self.done.set_result(self._results)


def _with_results(rows: pa.Table, results: list[dict[str, Any]]) -> pa.Table:
    extras = schema.extras_of(rows.schema)
    columns = []
    for field in schema.failed(extras):
        if field in (schema.IMAGE, schema.ERROR) or field in schema.DRAWN:
            columns.append(pa.array([result.get(field.name) for result in results], field.type))
        else:
            columns.append(rows[field.name])
    return pa.table(columns, schema=schema.failed(extras))


def _fail_all(rows: pa.Table, reason: str) -> pa.Table:
    at = rows.schema.get_field_index("error")
    errors = [error or reason for error in rows["error"].to_pylist()]
    return rows.set_column(at, schema.ERROR, pa.array(errors, pa.string()))


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))

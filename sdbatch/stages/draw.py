"""The drawing stage, in an actor with an engine: requests to encoded images.

Shards in flight share the engine, so that its batches stay full across shards. Images are encoded
in threads of their own while the engine draws.
"""

import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import ValidationError

from sdbatch import schema
from sdbatch.engine.request import Drawn, EngineProtocol, Request
from sdbatch.errors import SdbatchError, one_line
from sdbatch.inputs.prepare import Prepared, refit
from sdbatch.job import describe_error
from sdbatch.output.image_file import Encoding, encode_image
from sdbatch.sampling import SIDE_MULTIPLE
from sdbatch.stages.base import Needs, Stage, image_column, replace_columns


class DrawImages(Stage):
    """Draws shards with one engine. No row is lost: one that fails leaves with its `error`.

    Args:
        make_engine: makes the engine, in the process that draws.
        encoding: of the images.
        encoders: threads that encode.
        needs: of an actor.
        again: sampling keys of each further time that an image is drawn, from itself.
    """

    name = "draw"
    adds = pa.schema(schema.RESULTS)

    def __init__(
        self,
        make_engine: Callable[[], EngineProtocol],
        encoding: Encoding,
        encoders: int = 1,
        needs: Needs = Needs(),  # noqa: B008  a frozen value
        again: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self.needs = replace(needs, columns=schema.requests(schema.NO_COLUMNS).names)
        self._make_engine = make_engine
        self._encoding = encoding
        self._threads = encoders
        self._again = again

    def open(self) -> None:
        """Make the engine; raises what that raises."""
        self.engine = self._make_engine()
        self._encoders = ThreadPoolExecutor(self._threads, "sdbatch-encode")

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to a process: a copy in another one makes its own."""
        return {n: value for n, value in vars(self).items() if n not in ("engine", "_encoders")}

    def new_drawing(self, rows: list[dict[str, Any]]) -> "Drawing":
        """Return the drawing of rows that have the columns of schema.requests."""
        return Drawing(rows, self.engine, self._encoding, self._encoders, self._again)

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Draw a shard and wait for it."""
        drawing = self.new_drawing(request_rows(rows))
        drawing.start()
        return add_results(rows, drawing.done.result())


def request_rows(rows: pa.Table) -> list[dict[str, Any]]:
    """Return the rows of a shard without the table's own columns, which only pass through."""
    return list(rows.select(schema.requests(schema.NO_COLUMNS).names).to_pylist())


class Drawing:
    """The rows of one shard on their way through the engine and the encoders.

    Callbacks and threads, and one future for the shard: an asyncio task for each row would cost
    as much as encoding its image.
    """

    def __init__(
        self,
        rows: list[dict[str, Any]],
        engine: EngineProtocol,
        encoding: Encoding,
        encoders: ThreadPoolExecutor,
        again: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self.drawn = 0
        self.failed = 0
        self.lanes: dict[int, int] = {}  # lanes of the batch -> images drawn in that many
        self.done: Future[list[dict[str, Any]]] = Future()  # the result of each row, in order
        self._rows = rows
        self._engine = engine
        self._encoding = encoding
        self._encoders = encoders
        self._again = again
        self._results: list[dict[str, Any]] = [{}] * len(self._rows)
        self._left = len(self._rows)
        self._lock = threading.Lock()

    def start(self) -> None:
        """Submit the rows that can be drawn."""
        for index, row in enumerate(self._rows):
            if row["error"] is not None:
                self._finish(index, {"error": row["error"]})
            elif row[schema.INPUTS.name] is None:
                self._submit(index, None)
            else:
                self._encoders.submit(self._submit_with_pictures, index)

    def give_up(self, error: Exception) -> None:
        """End the shard with an error that no row caused."""
        with self._lock:
            if not self.done.done():
                self.done.set_exception(error)

    def _submit_with_pictures(self, index: int) -> None:
        try:
            prepared = Prepared.from_bytes(self._rows[index].pop(schema.INPUTS.name))
            self._submit(index, prepared)
        except Exception as error:  # noqa: BLE001  or the shard would wait for the row
            self.give_up(error)

    def _submit(self, index: int, prepared: Prepared | None) -> None:
        row = self._rows[index]
        values = {field.name: row[field.name] for field in schema.SAMPLING}
        request = Request(**values, inputs=prepared.arrays if prepared else {})
        later = partial(self._receive_later, index, request, prepared, 0)
        self._engine.submit(request).add_done_callback(later)

    def _receive_later(
        self,
        index: int,
        request: Request,
        prepared: Prepared | None,
        times: int,
        drawn: Future[Drawn],
    ) -> None:
        # not in the engine's thread
        self._encoders.submit(self._receive, index, request, prepared, times, drawn)

    def _receive(
        self,
        index: int,
        request: Request,
        prepared: Prepared | None,
        times: int,
        future: Future[Drawn],
    ) -> None:
        """Encode an image that was drawn again `times` times, or draw it once more."""
        row = self._rows[index]
        try:
            drawn = future.result()
            image = prepared.finish(drawn.image) if prepared else drawn.image
            if times < len(self._again):
                request = drawn_again(request, self._again[times], image)
                later = partial(self._receive_later, index, request, None, times + 1)
                self._engine.submit(request).add_done_callback(later)
                return
            file = encode_image(image, row, self._encoding)
        except SdbatchError as error:
            self.give_up(error)  # the engine cannot go on
        except Exception as error:  # noqa: BLE001  caused by this row, as it was drawn alone
            self._finish(index, {"error": f"{type(error).__name__}: {one_line(error)}"})
        else:
            with self._lock:
                self.lanes[drawn.lanes] = self.lanes.get(drawn.lanes, 0) + 1
            result = {
                "image": {"bytes": file, "path": f"{row['key']}.{self._encoding.image_format}"},
                "prompt_tokens": drawn.prompt_tokens,
                "prompt_truncated": drawn.prompt_truncated,
                "decoded_again": drawn.decoded_again,
                "nsfw": drawn.nsfw,
                "nsfw_scores": drawn.nsfw_scores,
                "sha256": hashlib.sha256(file).hexdigest(),
                "error": None,
            }
            self._finish(index, result)

    def _finish(self, index: int, result: dict[str, Any]) -> None:
        with self._lock:
            self._results[index] = result
            self._left -= 1
            self.failed += result["error"] is not None
            self.drawn += result["error"] is None
            if not self._left and not self.done.done():
                self.done.set_result(self._results)


def drawn_again(request: Request, changes: Mapping[str, Any], image: NDArray[np.uint8]) -> Request:
    """Return the request that draws an image (H, W, 3) again from itself, with changed values.

    Without a size in the changes it keeps its own, rounded down to what can be drawn.

    Raises:
        ValueError: the values do not fit each other.
    """
    height, width = (side // SIDE_MULTIPLE * SIDE_MULTIPLE for side in image.shape[:2])
    values = request.model_dump(exclude={"inputs"})
    values |= {"height": height, "width": width, "hires_scale": 1.0, **changes}
    try:
        again = Request.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"drawn again: {describe_error(error).rstrip('.')}") from None
    return again.model_copy(update={"inputs": {"image": refit(again, image)}})


def add_results(rows: pa.Table, results: list[dict[str, Any]]) -> pa.Table:
    """Return a shard's table with the columns that drawing adds; `results` are those of a drawing.

    A result without a column has null there. The files of the images are not copied, and the
    pictures that rows were drawn from are left behind.
    """
    rows = rows.drop_columns([schema.INPUTS.name])
    errors = pa.array([result["error"] for result in results], schema.ERROR.type)
    images = image_column(result.get("image") for result in results)
    rows = rows.append_column(schema.IMAGE, images)
    for field in schema.DRAWN:
        values = [result.get(field.name) for result in results]
        rows = rows.append_column(field, pa.array(values, field.type))
    return replace_columns(rows, {"error": errors})

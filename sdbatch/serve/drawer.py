"""A replica's engine: draws, encodes, and tells those who follow. No Ray and no HTTP in here."""

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np

from sdbatch.engine.request import Drawn, Follow, Request
from sdbatch.errors import SdbatchError
from sdbatch.output.image_file import Encoding, encode

STUCK_SECONDS = 600.0  # a round of the engine may compile, and on a CPU be of large images


class Engine(Protocol):
    """What a drawer needs of an engine; engine.Engine is one, the tests' fake engine another."""

    @property
    def stalled_seconds(self) -> float:
        """Return for how long it has had work and done none; infinite where it has ended."""

    def submit(
        self, request: Request, *, exact: bool = True, follow: Follow | None = None
    ) -> Future[Drawn]:
        """Queue a request."""


@dataclass(frozen=True)
class Asked:
    """An image to draw, and how it is to be delivered."""

    request: Request
    encoding: Encoding
    sample_index: int = 0
    exact: bool = False  # bit for bit as a batch run draws it, if that takes longer
    previews: int = 0


@dataclass(frozen=True)
class Step:
    """So many UNet calls of an image are done."""

    done: int
    of: int


@dataclass(frozen=True)
class Picture:
    """An encoded image, or a preview of it, and what was learned of it."""

    file: bytes
    preview: bool
    lanes: int
    exact: bool
    prompt_tokens: int
    prompt_truncated: bool
    nsfw: bool | None
    nsfw_scores: tuple[float, ...] | None

    @property
    def sha256(self) -> str:
        """Return this file's hash; a batch run's says its row_key too, and so has another."""
        return hashlib.sha256(self.file).hexdigest()


@dataclass(frozen=True)
class NotDrawn:
    """Why there is no image: by the request's fault, the safety checker's finding, or ours."""

    reason: str
    fault: str  # request, safety, engine


class Drawer:
    """Draws with one engine.

    Args:
        make_engine: loads it.
        policy: what is done about images that are not safe for work: flag, blank, drop.
        encoders: threads that encode images.
    """

    def __init__(self, make_engine: Callable[[], Engine], policy: str, encoders: int = 1) -> None:
        self._engine = make_engine()
        self._policy = policy
        self._encoders = ThreadPoolExecutor(encoders)

    async def draw(self, asked: Asked, follow: Follow | None = None) -> Picture | NotDrawn:
        """Draw an image; cancelled, it gives up its lanes.

        Raises:
            SdbatchError: the engine cannot go on.
        """
        try:
            drawn = await asyncio.wrap_future(
                self._engine.submit(asked.request, exact=asked.exact, follow=follow)
            )
        except SdbatchError:
            raise
        except ValueError as error:
            return NotDrawn(_line(error), "request")
        except Exception as error:  # noqa: BLE001  of this request alone, told to who asked
            return NotDrawn(f"{type(error).__name__}: {_line(error)}", "engine")
        if drawn.nsfw and self._policy == "drop":
            worst = max(drawn.nsfw_scores or ())
            reason = f"safety = nsfw by {worst:.3f}: dropped, as safety.policy says"
            return NotDrawn(reason, "safety")
        return await self._encoded(asked, drawn, preview=False)

    async def follow(self, asked: Asked) -> AsyncGenerator[Step | Picture | NotDrawn]:
        """Draw an image and yield how far it is, its previews, then what came of it."""
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Step | Drawn | None] = asyncio.Queue()

        def tell(event: Step | Drawn) -> None:  # from the engine's threads
            loop.call_soon_threadsafe(events.put_nowait, event)

        def step(done: int, of: int) -> None:
            tell(Step(done, of))

        drawing = asyncio.ensure_future(self.draw(asked, Follow(step, tell, asked.previews)))
        drawing.add_done_callback(lambda _: events.put_nowait(None))
        try:
            while (event := await events.get()) is not None:
                if isinstance(event, Drawn):
                    yield await self._encoded(asked, event, preview=True)
                elif events.empty():  # else there is later news
                    yield event
            yield drawing.result()
        finally:
            drawing.cancel()

    async def check_health(self) -> None:
        """Raise a RuntimeError if the engine's thread has ended or stands still."""
        stalled = self._engine.stalled_seconds
        if stalled > STUCK_SECONDS:
            raise RuntimeError(f"engine = still for {stalled:.0f} s: this replica must be replaced")

    async def _encoded(self, asked: Asked, drawn: Drawn, *, preview: bool) -> Picture:
        hidden = drawn.nsfw and self._policy != "flag"
        image = np.zeros_like(drawn.image) if hidden else drawn.image
        row: dict[str, Any] = {
            **asdict(asked.request),
            "row_key": "",
            "sample_index": asked.sample_index,
        }
        loop = asyncio.get_running_loop()
        file = await loop.run_in_executor(
            self._encoders, partial(encode, image, row, asked.encoding)
        )
        return Picture(
            file,
            preview,
            drawn.lanes,
            drawn.exact,
            drawn.prompt_tokens,
            drawn.prompt_truncated,
            drawn.nsfw,
            drawn.nsfw_scores,
        )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())

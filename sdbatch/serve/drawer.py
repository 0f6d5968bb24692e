"""A replica's engine: draws, encodes, and reports progress. No Ray and no HTTP in here."""

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal, TypeGuard

from sdbatch.engine.request import Drawn, EngineProtocol, Follow, Request
from sdbatch.errors import SdbatchError, one_line
from sdbatch.inputs.prepare import Prepared
from sdbatch.output.image_file import Encoding, encode_image
from sdbatch.serve.errors import sentence
from sdbatch.stages.safety import SafetyPolicy, black

STALLED_SECONDS = 600.0  # a tick may compile, and on a CPU draw large images


@dataclass(frozen=True)
class Version:
    """What images are drawn with; while an update runs, there are Drawers of two versions."""

    settings: str  # all that changes the pixels of a request
    defaults: str  # what requests leave out; a Drawer has checked that it can draw with them
    model: str  # its name and hash in the images' metadata
    model_hash: str


@dataclass(frozen=True)
class DrawRequest:
    """One image to draw, and how it is delivered."""

    request: Request
    encoding: Encoding
    sample_index: int = 0
    exact: bool = False  # bit for bit as a batch run draws it, even if that takes longer
    previews: int = 0  # the number of previews
    prepared: Prepared | None = None  # its pictures, whose arrays are the request's inputs
    version: Version | None = None  # what the image should be drawn with

    @property
    def hashes(self) -> dict[str, str]:
        """Return the sha256 of its pictures by the names of their columns in an output."""
        hashes = self.prepared.sha256 if self.prepared else {}
        return {f"{name}_sha256": sha256 for name, sha256 in hashes.items()}


@dataclass(frozen=True)
class Progress:
    """How many steps of an image are done."""

    step: int
    steps: int


@dataclass(frozen=True)
class ImageFacts:
    """How an image was drawn."""

    height: int
    width: int
    lanes: int
    exact: bool
    prompt_tokens: int
    prompt_truncated: bool
    decoded_again: bool
    nsfw: bool | None
    nsfw_scores: tuple[float, ...] | None
    sha256: str  # of its file; a batch run's file also holds its row_key, so its hash differs


@dataclass(frozen=True)
class EncodedImage:
    """The file of an image or of a preview."""

    file: bytes
    facts: ImageFacts
    preview: bool


@dataclass(frozen=True)
class DrawFailure:
    """Why an image was not drawn."""

    reason: str  # one sentence
    cause: Literal["request", "safety", "engine"]


Event = Progress | EncodedImage | DrawFailure


def is_on_the_way(event: Event) -> TypeGuard[Progress | EncodedImage]:
    """Tell whether an event is progress or a preview, after which others follow."""
    return isinstance(event, Progress) or (isinstance(event, EncodedImage) and event.preview)


class Drawer:
    """Draws with one engine.

    Args:
        make_engine: loads the model and starts the engine.
        policy: for images that are not safe for work.
        encoder_threads: number of threads that encode images.
        version: what it draws with; None: whatever the requests expect.
    """

    def __init__(
        self,
        make_engine: Callable[[], EngineProtocol],
        policy: SafetyPolicy,
        encoder_threads: int = 1,
        version: Version | None = None,
    ) -> None:
        self._engine = make_engine()
        self._policy = policy
        self._encoders = ThreadPoolExecutor(encoder_threads)
        self._version = version

    async def draw(self, draw_request: DrawRequest) -> EncodedImage | DrawFailure:
        """Draw an image; if this call is cancelled, the image's lanes are released.

        Raises:
            SdbatchError: the engine cannot go on.
        """
        return await self._draw(draw_request, None)

    async def draw_events(self, draw_request: DrawRequest) -> AsyncGenerator[Event]:
        """Draw an image; yield its progress and previews, then the image or its failure."""
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Progress | Drawn | None] = asyncio.Queue()

        def add(event: Progress | Drawn) -> None:  # called by the engine's threads
            loop.call_soon_threadsafe(events.put_nowait, event)

        def add_step(step: int, steps: int) -> None:
            add(Progress(step, steps))

        follow = Follow(add_step, add, draw_request.previews)
        drawing = asyncio.ensure_future(self._draw(draw_request, follow))
        drawing.add_done_callback(lambda _: events.put_nowait(None))
        try:
            while (event := await events.get()) is not None:
                if isinstance(event, Drawn):
                    yield await self._encode(draw_request, event, preview=True)
                elif events.empty():  # skip progress that is outdated already
                    yield event
            yield drawing.result()
        finally:
            drawing.cancel()

    async def check_health(self) -> None:
        """Raise a RuntimeError if the engine has ended or makes no progress."""
        seconds = self._engine.stalled_seconds
        if seconds > STALLED_SECONDS:
            raise RuntimeError(
                f"The engine has made no progress for {seconds:.0f} s. This replica must be "
                f"replaced."
            )

    async def has_version(self, version: Version) -> bool:
        """Tell whether it draws with this version, its defaults too."""
        return version == self._version

    def engine_ended(self, error: SdbatchError) -> None:
        """Called when the engine cannot go on; application.ReplicaDrawer ends its process then."""

    async def _draw(
        self, draw_request: DrawRequest, follow: Follow | None
    ) -> EncodedImage | DrawFailure:
        try:
            drawn = await asyncio.wrap_future(
                self._engine.submit(draw_request.request, exact=draw_request.exact, follow=follow)
            )
        except SdbatchError as error:
            self.engine_ended(error)
            raise
        except ValueError as error:
            return DrawFailure(sentence(error), "request")
        except Exception as error:  # noqa: BLE001  of this image alone; its client gets the text
            return DrawFailure(sentence(f"{type(error).__name__}: {one_line(error)}"), "engine")
        reason = self._policy.reason_to_drop(drawn.nsfw, drawn.nsfw_scores)
        if reason is not None:
            return DrawFailure(f"{sentence(reason)} Change the prompt or the seed.", "safety")
        return await self._encode(draw_request, drawn, preview=False)

    async def _encode(
        self, draw_request: DrawRequest, drawn: Drawn, *, preview: bool
    ) -> EncodedImage:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._encoders, self._encode_image, draw_request, drawn, preview
        )

    def _encode_image(self, draw_request: DrawRequest, drawn: Drawn, preview: bool) -> EncodedImage:
        prepared = draw_request.prepared
        image = drawn.image if prepared is None else prepared.finish(drawn.image)
        height, width, _ = image.shape  # the picture's, where only its mask was drawn
        if self._policy.hides(drawn.nsfw):
            image = black(height, width)
        row = {
            **draw_request.request.model_dump(exclude={"inputs"}),
            "row_key": "",
            "sample_index": draw_request.sample_index,
            **draw_request.hashes,
        }
        encoding, is_same = draw_request.encoding, True
        if self._version is not None:  # the file names the model that drew it
            is_same = draw_request.version is None or (
                draw_request.version.settings == self._version.settings
            )
            model, model_hash = self._version.model, self._version.model_hash
            encoding = replace(encoding, model=model, model_hash=model_hash)
        file = encode_image(image, row, encoding)
        facts = ImageFacts(
            height=height,
            width=width,
            lanes=drawn.lanes,
            exact=drawn.exact and is_same,
            prompt_tokens=drawn.prompt_tokens,
            prompt_truncated=drawn.prompt_truncated,
            decoded_again=drawn.decoded_again,
            nsfw=drawn.nsfw,
            nsfw_scores=drawn.nsfw_scores,
            sha256=hashlib.sha256(file).hexdigest(),
        )
        return EncodedImage(file, facts, preview)

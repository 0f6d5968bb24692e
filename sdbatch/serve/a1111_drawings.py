"""What each API key draws now through AUTOMATIC1111's API: progress, previews, and early ends.

No HTTP in here. One key never sees or ends what another one draws.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from sdbatch.serve.drawer import DrawRequest, EncodedImage, Progress
from sdbatch.serve.jobs import OnEvent
from sdbatch.serve.requests import ImageRequest

# A preview costs a decoding, so only keys that poll get them. A client polls while it waits for its
# images, and between two requests its user writes a prompt.
POLL_SECONDS = 600.0
PREVIEW_STEPS = 10  # between two previews, as AUTOMATIC1111's show_progress_every_n_steps
Draw = Callable[[ImageRequest, OnEvent], Awaitable[list[EncodedImage]]]


class ImageInProgress:
    """One image of a request."""

    def __init__(self, draw_request: DrawRequest) -> None:
        self.draw_request = draw_request
        self.step = 0
        self.steps = draw_request.request.num_inference_steps
        self.preview: EncodedImage | None = None  # the last one
        self._drawn: EncodedImage | None = None
        self._is_ended = False  # early, by its client
        self._task: asyncio.Task[None] | None = None

    @property
    def has_ended(self) -> bool:
        """Tell whether it is drawn, or is not drawn any further."""
        return self._drawn is not None or self._is_ended

    @property
    def part_done(self) -> float:
        """Return how much of it is drawn, in [0, 1]."""
        return 1.0 if self.has_ended else self.step / self.steps

    @property
    def shown(self) -> EncodedImage | None:
        """Return the image; of one that was ended early the last preview, if there is one."""
        return self._drawn or self.preview

    def start(self, draw: Draw, image_request: ImageRequest) -> "asyncio.Task[None]":
        """Begin to draw it; return the task, which raises an ApiError if it cannot be drawn."""
        self._task = asyncio.ensure_future(self._run(draw, image_request))
        if self._is_ended:  # before it began
            self._task.cancel()
        return self._task

    def end(self) -> None:
        """Draw it no further; its lanes are released at the next tick."""
        if not self.has_ended:
            self._is_ended = True
            if self._task is not None:
                self._task.cancel()

    async def _run(self, draw: Draw, image_request: ImageRequest) -> None:
        request = replace(image_request, draw_requests=(self.draw_request,))
        [self._drawn] = await draw(request, self._update)

    def _update(self, _: int, event: Progress | EncodedImage) -> None:
        if isinstance(event, Progress):
            self.step, self.steps = event.step, event.steps
        else:
            self.preview = event


class Drawing:
    """The images of one request; each can be ended without the others.

    Args:
        job: AUTOMATIC1111's name of what is done.
        image_request: what to draw.
        previews: whether to draw previews.
    """

    def __init__(self, job: str, image_request: ImageRequest, *, previews: bool) -> None:
        self.job = job
        self.started_at = time.time()  # seconds since 1970
        self._image_request = image_request
        self.images = [
            ImageInProgress(replace(each, previews=_previews(each) if previews else 0))
            for each in image_request.draw_requests
        ]

    async def run(self, draw: Draw) -> list[tuple[DrawRequest, EncodedImage]]:
        """Draw all images; return those that have something to show, with what was requested.

        An image that was ended early is its last preview; without one it is left out.

        Raises:
            ApiError: one of the images could not be drawn; the others are cancelled.
        """
        tasks = [image.start(draw, self._image_request) for image in self.images]
        try:
            # cancelled tasks do not end this wait: they are those of images that were ended early
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            errors = [task.exception() for task in done if not task.cancelled()]
            for error in filter(None, errors):
                raise error
        finally:
            for task in tasks:
                task.cancel()
        pairs = [(image.draw_request, image.shown) for image in self.images]
        return [(draw_request, image) for draw_request, image in pairs if image is not None]

    def interrupt(self) -> None:
        """End all images that are not drawn yet."""
        for image in self.images:
            image.end()


class KeyDrawings:
    """What one API key draws now."""

    def __init__(self) -> None:
        self.interrupted = False  # since its last request began, as AUTOMATIC1111 says it
        self.skipped = False
        self._polled_at: float | None = None
        self._running: list[Drawing] = []  # the oldest first

    @property
    def job(self) -> str:
        """Return what is done, in AUTOMATIC1111's words; "" if nothing is."""
        return self._running[0].job if self._running else ""

    @property
    def started_at(self) -> float | None:
        """Return when the oldest request began, in seconds since 1970."""
        return self._running[0].started_at if self._running else None

    @property
    def images(self) -> list[ImageInProgress]:
        """Return all images of the running requests."""
        return [image for drawing in self._running for image in drawing.images]

    @property
    def current(self) -> ImageInProgress | None:
        """Return the image that will be drawn next: of those that are not, the furthest."""
        images = [image for image in self.images if not image.has_ended]
        return max(images, key=lambda image: image.part_done, default=None)

    def count_poll(self) -> None:
        """Record that the client looks at previews."""
        self._polled_at = time.monotonic()

    @contextmanager
    def running(self, job: str, image_request: ImageRequest) -> Iterator[Drawing]:
        """Count a request as running; yield its drawing."""
        polled_at = self._polled_at
        previews = polled_at is not None and time.monotonic() - polled_at < POLL_SECONDS
        drawing = Drawing(job, image_request, previews=previews)
        self.interrupted = self.skipped = False
        self._running.append(drawing)
        try:
            yield drawing
        finally:
            self._running.remove(drawing)

    def interrupt(self) -> None:
        """End all images."""
        self.interrupted = True
        for drawing in self._running:
            drawing.interrupt()

    def skip(self) -> None:
        """End the current image."""
        self.skipped = True
        if self.current is not None:
            self.current.end()


class Drawings:
    """What all keys draw now. Belongs to one event loop."""

    def __init__(self) -> None:
        self._keys: dict[str, KeyDrawings] = {}  # by name; as many as the operator has keys

    def of(self, key: str) -> KeyDrawings:
        """Return what the key of this name draws."""
        return self._keys.setdefault(key, KeyDrawings())


def _previews(draw_request: DrawRequest) -> int:
    """Return the number of previews of an image."""
    return max(1, draw_request.request.num_inference_steps // PREVIEW_STEPS)

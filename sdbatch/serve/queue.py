"""The images that are accepted and not yet drawn, and who waits with how many."""

import time
from collections import deque
from collections.abc import Callable

from sdbatch.job import Serve
from sdbatch.serve.access import ApiKey
from sdbatch.serve.errors import ApiError, invalid_value, shutting_down
from sdbatch.serve.metrics import Metrics
from sdbatch.serve.requests import ImageRequest

WAIT_IMAGES = 64  # the last ones, whose times give an estimate of the wait
MAX_PICTURE_BYTES = 2**30  # of the pictures of all images that wait or are being drawn
MAX_WAIT_SECONDS, DEFAULT_WAIT_SECONDS = 60.0, 5.0


class Reservation:
    """Room in the queue for the images of one request; released with its object at the latest."""

    def __init__(
        self,
        number: int,
        images: int,
        pictures_size: int,
        release: Callable[["Reservation"], None],
    ) -> None:
        self.number = number
        self.images = images
        self.pictures_size = pictures_size  # bytes
        self._release: Callable[[Reservation], None] | None = release

    def close(self) -> None:
        """Release it; once is enough."""
        release, self._release = self._release, None
        if release is not None:
            release(self)

    def __enter__(self) -> "Reservation":
        """Return the reservation."""
        return self

    def __exit__(self, *_: object) -> None:
        """Release it."""
        self.close()

    def __del__(self) -> None:
        """Release it if its response was never started because the client disconnected."""
        self.close()


class ImageQueue:
    """Room for images. Belongs to one event loop."""

    def __init__(self, settings: Serve, metrics: Metrics) -> None:
        self.stopping = False  # accept no more requests
        self._settings = settings
        self._metrics = metrics
        self._images: dict[int, int] = {}  # number of a reservation -> its images
        self._pictures_size = 0  # bytes of all reservations
        self._last_number = 0
        self._drawn_at: deque[float] = deque(maxlen=WAIT_IMAGES)

    @property
    def pending(self) -> int:
        """Return how many images wait or are being drawn."""
        return sum(self._images.values())

    @property
    def seconds_since_drawn(self) -> float | None:
        """Return the seconds since the last image was drawn; None if none was."""
        return time.monotonic() - self._drawn_at[-1] if self._drawn_at else None

    def position(self, reservation: Reservation) -> int:
        """Return how many pending images are before those of `reservation`."""
        return sum(images for number, images in self._images.items() if number < reservation.number)

    def reserve(self, image_request: ImageRequest, key: ApiKey) -> Reservation:
        """Reserve room for the images of a request.

        Raises:
            ApiError: the queue is full, the key's limit is reached, or the service shuts down.
        """
        if self.stopping:
            raise shutting_down()
        images, most = len(image_request.draw_requests), self._settings.queue
        if images > most:
            raise invalid_value("n", f"{images}: must be {most} at most, the length of the queue")
        full = self._pictures_size + image_request.pictures_size > MAX_PICTURE_BYTES
        if self.pending + images > most or full:
            self._metrics.count_images("refused", images)
            raise ApiError(
                503,
                f"The queue is full: {self.pending} images wait. Retry later.",
                code="overloaded",
                retry_after=self._estimate_wait(images),
            )
        key.spend(images)
        self._last_number += 1
        self._images[self._last_number] = images
        self._pictures_size += image_request.pictures_size
        self._metrics.open.set(self.pending)
        return Reservation(self._last_number, images, image_request.pictures_size, self._release)

    def count_drawn(self) -> None:
        """Record that an image was drawn now."""
        self._drawn_at.append(time.monotonic())

    def _release(self, reservation: Reservation) -> None:
        del self._images[reservation.number]
        self._pictures_size -= reservation.pictures_size
        self._metrics.open.set(self.pending)

    def _estimate_wait(self, images: int) -> float:
        """Estimate the seconds until `images` images are drawn, from the times of the last ones."""
        if len(self._drawn_at) < 2:
            return DEFAULT_WAIT_SECONDS
        each = (self._drawn_at[-1] - self._drawn_at[0]) / (len(self._drawn_at) - 1)
        return min(MAX_WAIT_SECONDS, max(1.0, each * images))

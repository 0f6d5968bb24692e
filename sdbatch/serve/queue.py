"""The images that are accepted and not yet drawn, and how many of them a key may have."""

import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import NamedTuple

from sdbatch.job import Serve
from sdbatch.serve.access import ApiKey
from sdbatch.serve.errors import ApiError, invalid_value, shutting_down
from sdbatch.serve.metrics import Metrics
from sdbatch.serve.requests import ImageRequest
from sdbatch.serve.turns import Turns

WAIT_IMAGES = 64  # the last ones, whose times give an estimate of the wait
MAX_PICTURE_BYTES = 2**30  # of the pictures of all images that wait or are being drawn
MAX_WAIT_SECONDS, DEFAULT_WAIT_SECONDS = 60.0, 5.0


class Reservation:
    """Room in the queue for the images of one request; released with its object at the latest."""

    def __init__(self, number: int, key: str, release: Callable[["Reservation"], None]) -> None:
        self.number = number
        self.key = key  # the name of its API key
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


class _Size(NamedTuple):
    """What requests take of the queue."""

    images: int
    pictures: int  # bytes


class ImageQueue:
    """Room for images, shared by the keys. Belongs to one event loop.

    A key may have as many images in the queue as are free, so there is room for another key however
    much the first one sends: half of the queue for one busy key, a third each for two. An only key
    may have all.
    """

    def __init__(self, settings: Serve, metrics: Metrics) -> None:
        self.stopping = False  # accept no more requests
        self.turns = Turns(metrics)
        self._room = _Size(settings.queue, MAX_PICTURE_BYTES)
        self._metrics = metrics
        self._reserved: dict[int, tuple[str, _Size]] = {}  # number of a reservation -> key, size
        self._arriving: dict[int, int] = {}  # its images that do not wait for their turn yet
        self._last_number = 0
        self._drawn_at: deque[float] = deque(maxlen=WAIT_IMAGES)

    @property
    def pending(self) -> int:
        """Return how many images wait or are being drawn."""
        return self._sum().images

    @property
    def seconds_since_drawn(self) -> float | None:
        """Return the seconds since the last image was drawn; None if none was."""
        return time.monotonic() - self._drawn_at[-1] if self._drawn_at else None

    def position(self, reservation: Reservation) -> int:
        """Return how many images are before the next one of `reservation`, by the order of turns.

        Later requests of keys that have none now can still come between them.
        """
        arriving = (
            images for number, images in self._arriving.items() if number < reservation.number
        )
        return self.turns.count_before(reservation.key, reservation.number) + sum(arriving)

    def turn(self, reservation: Reservation, deadline: float) -> AbstractAsyncContextManager[None]:
        """Wait for the turn of one image of `reservation`; see Turns.turn."""
        self._arriving[reservation.number] -= 1
        return self.turns.turn(reservation.key, reservation.number, deadline)

    def reserve(self, image_request: ImageRequest, key: ApiKey) -> Reservation:
        """Reserve room for the images of a request.

        Raises:
            ApiError: the queue is full, the key's share or limit is reached, or the service shuts
                down.
        """
        if self.stopping:
            raise shutting_down()
        size = _size_of(image_request)
        self._check_room(size, key)
        key.spend(size.images)
        return self._add(size, key.name)

    def check(self, images: int, key: ApiKey) -> None:
        """Raise the ApiError that `reserve` would, before pictures are decoded in vain."""
        if self.stopping:
            raise shutting_down()
        self._check_room(_Size(images, 0), key)

    def restore(self, image_request: ImageRequest, key: str) -> Reservation:
        """Reserve room for a job that was accepted before a restart, even if the queue is full.

        Args:
            image_request: its images.
            key: the name of its API key, which has spent them already.

        Raises:
            ApiError: the service shuts down.
        """
        if self.stopping:
            raise shutting_down()
        return self._add(_size_of(image_request), key)

    def _add(self, size: _Size, key: str) -> Reservation:
        self._last_number += 1
        self._reserved[self._last_number] = key, size
        self._arriving[self._last_number] = size.images
        self._metrics.open.set(self.pending)
        return Reservation(self._last_number, key, self._release)

    def most_images(self, key: ApiKey) -> int:
        """Return how many images a request of `key` may have: as many as an empty queue holds."""
        return _share(self._room.images, 0, key)

    def count_drawn(self) -> None:
        """Record that an image was drawn now."""
        self._drawn_at.append(time.monotonic())

    def _check_room(self, size: _Size, key: ApiKey) -> None:
        """Raise an ApiError if there is no room for a request of this size."""
        images = size.images
        most = self.most_images(key)
        if images > most:
            part = "the length of the queue" if key.is_only else "the share of a key in the queue"
            raise invalid_value("n", f"{images}: must be {most} at most, {part}")
        pending, own = self._sum(), self._sum(key.name)
        for needed, room, used, used_by_key in zip(size, self._room, pending, own, strict=True):
            free = room - used
            if needed > free:
                text = f"The queue is full: {pending.images} images wait. Retry later."
                raise self._refuse(503, text, "overloaded", images)
            if needed > _share(free, used_by_key, key):
                text = (
                    f"This key has {own.images} images in the queue, and its share has no room "
                    f"for {images} more. Retry when some are drawn."
                )
                raise self._refuse(429, text, "queue_share", images)

    def _refuse(self, status: int, text: str, code: str, images: int) -> ApiError:
        """Count refused images; return the error of their request."""
        self._metrics.count_images("refused", images)
        return ApiError(status, text, code=code, retry_after=self._estimate_wait(images))

    def _sum(self, key: str | None = None) -> _Size:
        """Return what all requests take, or those of one key."""
        sizes = [size for name, size in self._reserved.values() if key in (None, name)]
        return _Size(sum(size.images for size in sizes), sum(size.pictures for size in sizes))

    def _release(self, reservation: Reservation) -> None:
        del self._reserved[reservation.number], self._arriving[reservation.number]
        self._metrics.open.set(self.pending)

    def _estimate_wait(self, images: int) -> float:
        """Estimate the seconds until `images` images are drawn, from the times of the last ones."""
        if len(self._drawn_at) < 2:
            return DEFAULT_WAIT_SECONDS
        each = (self._drawn_at[-1] - self._drawn_at[0]) / (len(self._drawn_at) - 1)
        return min(MAX_WAIT_SECONDS, max(1.0, each * images))


def _share(free: int, own: int, key: ApiKey) -> int:
    """Return how many more a key that has `own` may take, one by one, while others leave `free`.

    Before each it may have fewer than are free, so n more need own + n <= free - (n - 1).
    """
    return free if key.is_only else max(0, (free - own + 1) // 2)


def _size_of(image_request: ImageRequest) -> _Size:
    return _Size(len(image_request.draw_requests), image_request.pictures_size)

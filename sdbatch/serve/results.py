"""Completed requests, and the images that are stored to be fetched by URL."""

import re
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cachetools import TTLCache

from sdbatch.job import Serve
from sdbatch.serve.drawer import EncodedImage, ImageFacts
from sdbatch.serve.requests import ImageRequest

SECRET_NAME = re.compile(r"([0-9a-f]{14})-[\w-]{24}", re.ASCII)


@dataclass(frozen=True)
class ResultImage:
    """An image of a completed request."""

    facts: ImageFacts
    content: bytes | str  # the file; or the name under which the service stores the file


@dataclass(frozen=True)
class Result:
    """A completed request."""

    request: ImageRequest
    images: tuple[ResultImage, ...]
    created: int  # seconds since 1970

    @property
    def size(self) -> int:
        """Return the bytes of its files; stored files count where they are stored."""
        return sum(len(each.content) for each in self.images if isinstance(each.content, bytes))


class StoredImages(ABC):
    """The files of images by their secret names, for a limited time: in memory, or in a store."""

    async def store(self, image_request: ImageRequest, images: Sequence[EncodedImage]) -> Result:
        """Return the result of a drawn request; store the files that are fetched by URL.

        Raises:
            ApiError: 503 if the store cannot be written.
        """
        files = [image.file for image in images]
        contents: Sequence[bytes | str] = files
        if image_request.by_url:
            stored = {f"{secret_name()}.{image_request.image_format}": file for file in files}
            await self.put(stored)
            contents = list(stored)
        pairs = zip(images, contents, strict=True)
        return Result(
            image_request.without_pictures(),
            tuple(ResultImage(image.facts, content) for image, content in pairs),
            created=int(time.time()),
        )

    @abstractmethod
    async def put(self, files: Mapping[str, bytes]) -> None:
        """Store files by their names; raises as `store` does."""

    @abstractmethod
    async def fetch(self, name: str) -> bytes | None:
        """Return a file; None if there is none of this name, or no longer; raises as `store`."""

    @abstractmethod
    async def remove_expired(self) -> None:
        """Remove the files that are older than `keep_s`; raises as `store` does."""


class ImagesInMemory(StoredImages):
    """Those fetched least recently are evicted."""

    def __init__(self, settings: Serve) -> None:
        seconds, max_bytes = settings.keep_s, settings.keep_mib * 2**20
        self.files: TTLCache[str, bytes] = TTLCache(
            max_bytes, seconds, getsizeof=lambda file: min(len(file), max_bytes)
        )

    async def put(self, files: Mapping[str, bytes]) -> None:
        """Store files by their names."""
        self.files.update(files)

    async def fetch(self, name: str) -> bytes | None:
        """Return a file; None if there is none of this name, or no longer."""
        return self.files.get(name)

    async def remove_expired(self) -> None:
        """Remove the files that are older than `keep_s`."""
        self.files.expire()


def secret_name() -> str:
    """Return a name that cannot be guessed; names sort by the time of this call."""
    return f"{time.time_ns() // 1000:014x}-{secrets.token_urlsafe(18)}"


def seconds_of(name: str) -> float:
    """Return when a secret name was made, in seconds since 1970."""
    return int(name.partition("-")[0], 16) / 1e6

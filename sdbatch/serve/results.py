"""Completed requests, and the images that are stored to be fetched by URL."""

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass

from cachetools import TTLCache

from sdbatch.job import Serve
from sdbatch.serve.drawer import EncodedImage, ImageFacts
from sdbatch.serve.requests import ImageRequest


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


class StoredImages:
    """The files of images by their secret names, for a limited time."""

    def __init__(self, settings: Serve) -> None:
        seconds, max_bytes = settings.keep_s, settings.keep_mib * 2**20
        self.files: TTLCache[str, bytes] = TTLCache(
            max_bytes, seconds, getsizeof=lambda file: min(len(file), max_bytes)
        )

    def store(self, image_request: ImageRequest, images: Sequence[EncodedImage]) -> Result:
        """Return the result of a drawn request; store the files that are fetched by URL."""
        files = [image.file for image in images]
        contents: Sequence[bytes | str] = files
        if image_request.by_url:
            stored = {f"{secret_name()}.{image_request.image_format}": file for file in files}
            self.files.update(stored)
            contents = list(stored)
        pairs = zip(images, contents, strict=True)
        return Result(
            image_request.without_pictures(),
            tuple(ResultImage(image.facts, content) for image, content in pairs),
            created=int(time.time()),
        )


def secret_name() -> str:
    """Return a name that cannot be guessed."""
    return secrets.token_urlsafe(18)

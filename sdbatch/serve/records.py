"""Long jobs as files of a store: JSON, and the files of pictures.

Others may be able to write the store, so nothing of it is unpickled, and all of it is checked.
"""

import io
import zipfile
from typing import Annotated, Any, Literal

from PIL import Image
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from sdbatch.engine.request import Request
from sdbatch.inputs.picture import DAMAGE
from sdbatch.inputs.prepare import Prepared
from sdbatch.output.image_file import Encoding
from sdbatch.registry import IMAGE_FORMATS
from sdbatch.serve.drawer import DrawRequest, ImageFacts
from sdbatch.serve.jobs import JobEnd, LongJob
from sdbatch.serve.requests import ImageRequest

_STRICT = ConfigDict(extra="forbid", strict=True)
_FileName = Annotated[str, Field(pattern=r"^[0-9a-f]{14}-[\w.-]+$")]


class DamagedRecord(Exception):
    """A file of a store that is not what was written."""


@checked_dataclass(frozen=True, config=_STRICT)
class AcceptedRecord:
    """A long job as it was accepted, without its pictures."""

    key: str  # the name of its API key
    encoding: Encoding
    requests: Annotated[list[Request], Field(min_length=1)]  # seeds and all else resolved
    exact: bool
    previews: int
    by_url: bool
    user: str | None
    has_pictures: bool

    def request(self, pictures: bytes | None) -> ImageRequest:
        """Return the images to draw.

        Args:
            pictures: their file, as `pictures_of` wrote it; None: leave the pictures out.

        Raises:
            DamagedRecord: the pictures cannot be read.
        """
        image_request = ImageRequest(
            tuple(
                DrawRequest(
                    request.model_copy(update={"inputs": {}}),
                    self.encoding,
                    sample_index=i,
                    exact=self.exact,
                    previews=self.previews,
                )
                for i, request in enumerate(self.requests)
            ),
            by_url=self.by_url,
            user=self.user,
        )
        return image_request if pictures is None else _with_pictures(image_request, pictures)


@checked_dataclass(frozen=True, config=_STRICT)
class EndedImage:
    """An image of a completed job."""

    facts: ImageFacts
    file: _FileName  # in the folder of jobs, or of images by URL


@checked_dataclass(frozen=True, config=_STRICT)
class EndedRecord:
    """How a long job ended."""

    status: Literal["completed", "failed", "cancelled"]
    at: float  # seconds since 1970
    images: list[EndedImage]
    images_created: int  # seconds since 1970
    error: dict[str, Any] | None


_ACCEPTED, _ENDED = TypeAdapter(AcceptedRecord), TypeAdapter(EndedRecord)
_NO_INPUTS: Any = {"requests": {"__all__": {"inputs"}}}


def write_accepted(job: LongJob) -> bytes:
    """Return the record of a job that is being accepted."""
    first = job.request.draw_requests[0]
    record = AcceptedRecord(
        key=job.key,
        encoding=first.encoding,
        requests=[each.request for each in job.request.draw_requests],
        exact=first.exact,
        previews=first.previews,
        by_url=job.request.by_url,
        user=job.request.user,
        has_pictures=first.prepared is not None,
    )
    return _ACCEPTED.dump_json(record, exclude=_NO_INPUTS)


def pictures_of(job: LongJob) -> bytes | None:
    """Return the pictures of a job as one file; None if it has none."""
    prepared = job.request.draw_requests[0].prepared
    return None if prepared is None else prepared.to_bytes()


def read_accepted(data: bytes) -> AcceptedRecord:
    """Return the record of an accepted job; raises a DamagedRecord if it is none."""
    try:
        record = _ACCEPTED.validate_json(data)
    except ValidationError as error:
        raise DamagedRecord("the record of the job") from error
    if record.encoding.image_format not in IMAGE_FORMATS:
        raise DamagedRecord("the record of the job")
    return record


def write_ended(end: JobEnd, files: list[str]) -> bytes:
    """Return the record of a job's end.

    Args:
        end: how it ended.
        files: the names of its images' files.
    """
    result = end.result
    images = () if result is None else result.images
    pairs = zip(images, files, strict=True)
    record = EndedRecord(
        status=end.status,
        at=end.at,
        images=[EndedImage(image.facts, file) for image, file in pairs],
        images_created=0 if result is None else result.created,
        error=end.error,
    )
    return _ENDED.dump_json(record)


def read_ended(data: bytes) -> EndedRecord:
    """Return the record of a job's end; raises a DamagedRecord if it is none."""
    try:
        return _ENDED.validate_json(data)
    except ValidationError as error:
        raise DamagedRecord("the record of its end") from error


def _with_pictures(image_request: ImageRequest, file: bytes) -> ImageRequest:
    try:
        with zipfile.ZipFile(io.BytesIO(file)) as members:
            if sum(info.file_size for info in members.infolist()) > len(file):
                raise DamagedRecord("the file of its pictures")  # compressed: not by us
        return image_request.with_pictures(Prepared.from_bytes(file))
    except (*DAMAGE, zipfile.BadZipFile, Image.DecompressionBombError) as error:
        raise DamagedRecord("the file of its pictures") from error

"""The responses of the API: their models for the documentation, and how they are built.

Nothing is stored here: the service stores files and results before a response is built.
"""

import base64
import time
from dataclasses import asdict
from typing import Literal

from pydantic import BaseModel, Field

from sdbatch.registry import IMAGE_FORMATS
from sdbatch.serve.drawer import DrawRequest, EncodedImage
from sdbatch.serve.jobs import LongJob
from sdbatch.serve.requests import ApiFormat
from sdbatch.serve.results import Result, ResultImage

FILES = "v1/images/files/"  # the path of stored images
JOBS = "v1/images/jobs/"


class Fault(BaseModel):
    """One fault of a request."""

    message: str
    param: str | None
    code: str | None


class ErrorDetail(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None
    details: list[Fault] | None = Field(
        None, description="each fault of the request, with status 400; param and code are the first"
    )


class Error(BaseModel):
    """An error response."""

    error: ErrorDetail


class Image(BaseModel):
    """An image, and how it was drawn."""

    b64_json: str | None = None
    url: str | None = None
    revised_prompt: str | None = Field(None, description="always null: no prompt is changed")
    seed: int
    lanes: int = Field(description="rows of the smallest UNet batch it was drawn in")
    exact: bool = Field(
        description="bit for bit what a batch run with the service's engine settings draws; "
        "otherwise the same except for rounding: one count of 255 in float32"
    )
    prompt_tokens: int
    prompt_truncated: bool
    decoded_again: bool = Field(
        description="in float32, because it was not finite in the engine's dtype"
    )
    nsfw: bool | None
    nsfw_scores: list[float] | None
    sha256: str = Field(description="of this file")


class Images(BaseModel):
    """The images of a request."""

    created: int
    data: list[Image]
    output_format: ApiFormat
    size: str
    model: str


class JobState(BaseModel):
    """A long job."""

    id: str
    object: Literal["image.job"]
    status: Literal["queued", "drawing", "completed", "failed", "cancelled"]
    created: int
    poll_url: str
    queue_position: int | None = Field(
        description="the number of images before it; null once it has ended"
    )
    progress: float
    result: Images | None
    error: ErrorDetail | None


def images(result: Result, model: str, base_url: str) -> Images:
    """Return the response of a completed request.

    Args:
        result: the images.
        model: the name of the model in the API.
        base_url: of the service as the client knows it, with a slash at its end.
    """
    facts = result.images[0].facts
    pairs = zip(result.request.draw_requests, result.images, strict=True)
    return Images(
        created=result.created,
        data=[_image(draw_request, image, base_url) for draw_request, image in pairs],
        output_format=IMAGE_FORMATS[result.request.image_format].api_name,
        size=f"{facts.width}x{facts.height}",
        model=model,
    )


def job_state(job: LongJob, queue_position: int | None, model: str, base_url: str) -> JobState:
    """Return the state of a long job.

    Args:
        job: the job.
        queue_position: the number of images before it; None if it has no place in the queue.
        model: the name of the model in the API.
        base_url: of the service as the client knows it, with a slash at its end.
    """
    return JobState(
        id=job.name,
        object="image.job",
        status=job.status,
        created=job.created,
        poll_url=f"{base_url}{JOBS}{job.name}",
        queue_position=None if job.has_ended else queue_position,
        progress=job.progress,
        result=None if job.result is None else images(job.result, model, base_url),
        error=None if job.error is None else ErrorDetail(**job.error),
    )


def partial_image_event(
    draw_request: DrawRequest, image: EncodedImage, index: int
) -> dict[str, object]:
    """Return the server-sent event of a preview, as OpenAI sends it."""
    return {
        "type": f"{_event_kind(draw_request)}.partial_image",
        **_event_fields(draw_request, image),
        "partial_image_index": index,
    }


def completed_event(draw_request: DrawRequest, image: EncodedImage) -> dict[str, object]:
    """Return the server-sent event of a finished image, as OpenAI sends it."""
    facts = image.facts
    return {
        "type": f"{_event_kind(draw_request)}.completed",
        **_event_fields(draw_request, image),
        "usage": {
            "input_tokens": facts.prompt_tokens,
            "input_tokens_details": {"text_tokens": facts.prompt_tokens, "image_tokens": 0},
            "output_tokens": 0,
            "total_tokens": facts.prompt_tokens,
        },
        "prompt_tokens": facts.prompt_tokens,
        "prompt_truncated": facts.prompt_truncated,
        "decoded_again": facts.decoded_again,
        "sha256": facts.sha256,
    }


def _image(draw_request: DrawRequest, image: ResultImage, base_url: str) -> Image:
    values = {"seed": draw_request.request.seed, **asdict(image.facts)}
    if isinstance(image.content, str):
        values["url"] = f"{base_url}{FILES}{image.content}"
    else:
        values["b64_json"] = base64.b64encode(image.content).decode()
    return Image.model_validate(values)


def _event_kind(draw_request: DrawRequest) -> str:
    return "image_generation" if draw_request.prepared is None else "image_edit"


def _event_fields(draw_request: DrawRequest, image: EncodedImage) -> dict[str, object]:
    """Return the fields that both kinds of events have."""
    facts = image.facts
    return {
        "b64_json": base64.b64encode(image.file).decode(),
        "created_at": int(time.time()),
        "size": f"{facts.width}x{facts.height}",
        "quality": "auto",
        "background": "opaque",
        "output_format": IMAGE_FORMATS[draw_request.encoding.image_format].api_name,
        "seed": draw_request.request.seed,
        "lanes": facts.lanes,
        "exact": facts.exact,
        "nsfw": facts.nsfw,
    }

"""The answers of the API, as its documents show them and as they are built."""

import base64
import time
from typing import Literal

from pydantic import BaseModel, Field

from sdbatch.serve.drawer import Picture
from sdbatch.serve.requests import Wanted
from sdbatch.serve.service import LongJob, Service

MEDIA = {"png": "image/png", "jpg": "image/jpeg", "webp": "image/webp"}
NAMES = {"jpg": "jpeg"}  # of formats, where OpenAI's differ


class Fault(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    """Any answer that is none."""

    error: Fault


class Image(BaseModel):
    """An image, and how it came to be."""

    b64_json: str | None = None
    url: str | None = None
    revised_prompt: str | None = Field(None, description="never: a prompt is drawn as it stands")
    seed: int
    lanes: int = Field(description="rows of the UNet batch it was drawn in, the fewest")
    exact: bool = Field(
        description="bit for bit what a batch run with the service's engine settings draws; "
        "otherwise the same but for rounding: one count of 255 in float32"
    )
    prompt_tokens: int
    prompt_truncated: bool
    nsfw: bool | None
    nsfw_scores: list[float] | None
    sha256: str = Field(description="of this file")


class Images(BaseModel):
    """What was drawn."""

    created: int
    data: list[Image]
    output_format: Literal["png", "jpeg", "webp"]
    size: str
    model: str


class JobState(BaseModel):
    """A long job."""

    id: str
    object: Literal["image.job"]
    status: Literal["queued", "drawing", "completed", "failed", "cancelled"]
    created: int
    poll_url: str
    queue_position: int | None = Field(description="images before it; null once it has ended")
    progress: float
    result: Images | None
    error: Fault | None


def images(wanted: Wanted, pictures: list[Picture], service: Service, base: str) -> Images:
    """Return the answer for drawn pictures; `base` is the service's own URL."""
    first = wanted.asked[0]
    form = first.encoding.image_format
    data = []
    for asked, picture in zip(wanted.asked, pictures, strict=True):
        where: dict[str, str] = {}
        if wanted.by_url:
            name = service.images.put((picture.file, MEDIA[form]), len(picture.file), f".{form}")
            where["url"] = f"{base}v1/images/files/{name}"
        else:
            where["b64_json"] = base64.b64encode(picture.file).decode()
        data.append(
            Image(
                **where,
                seed=asked.request.seed,
                lanes=picture.lanes,
                exact=picture.exact,
                prompt_tokens=picture.prompt_tokens,
                prompt_truncated=picture.prompt_truncated,
                nsfw=picture.nsfw,
                nsfw_scores=None if picture.nsfw_scores is None else list(picture.nsfw_scores),
                sha256=picture.sha256,
            )
        )
    return Images(
        created=int(time.time()),
        data=data,
        output_format=NAMES.get(form, form),
        size=f"{first.request.width}x{first.request.height}",
        model=service.offer.model,
    )


def job_state(name: str, job: LongJob, service: Service, base: str) -> JobState:
    """Return how far a long job is."""
    ended = job.task is None or job.task.done()
    return JobState(
        id=name,
        object="image.job",
        status=job.status,
        created=job.created,
        poll_url=f"{base}v1/images/jobs/{name}",
        queue_position=None if ended else service.ahead(job.place),
        progress=1.0 if job.status == "completed" else job.progress,
        result=_result(job, service, base),
        error=None if job.error is None else Fault(**job.error),
    )


def _result(job: LongJob, service: Service, base: str) -> Images | None:
    if job.status == "completed" and job.result is None:
        job.result = images(job.wanted, job.pictures, service, base)  # once: it names its images
        job.pictures = []
    result: Images | None = job.result
    return result


def event(kind: str, wanted: Wanted, picture: Picture, index: int | None) -> dict[str, object]:
    """Return a server-sent event as OpenAI sends partial images and the completed one."""
    asked = wanted.asked[0]
    form = asked.encoding.image_format
    told: dict[str, object] = {
        "type": f"image_generation.{kind}",
        "b64_json": base64.b64encode(picture.file).decode(),
        "created_at": int(time.time()),
        "size": f"{asked.request.width}x{asked.request.height}",
        "quality": "auto",
        "background": "opaque",
        "output_format": NAMES.get(form, form),
        "seed": asked.request.seed,
        "lanes": picture.lanes,
        "exact": picture.exact,
        "nsfw": picture.nsfw,
    }
    if index is not None:
        return {**told, "partial_image_index": index}
    tokens = picture.prompt_tokens
    usage = {
        "input_tokens": tokens,
        "input_tokens_details": {"text_tokens": tokens, "image_tokens": 0},
        "output_tokens": 0,
        "total_tokens": tokens,
    }
    return {
        **told,
        "usage": usage,
        "prompt_tokens": tokens,
        "prompt_truncated": picture.prompt_truncated,
        "sha256": picture.sha256,
    }

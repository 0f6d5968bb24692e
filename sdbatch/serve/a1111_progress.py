"""AUTOMATIC1111's routes about what is drawn now: progress, interrupt and skip.

Source of the values: AUTOMATIC1111's modules/shared_state.py and modules/api/api.py, 1.10.
"""

import base64
import time

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field

from sdbatch.serve.a1111_drawings import POLL_SECONDS, Drawings, KeyDrawings
from sdbatch.serve.http import documented_errors, json_response

LEAST_PROGRESS = 0.01  # of a running request: 0 means that nothing is drawn


class State(BaseModel):
    """What is drawn, as AUTOMATIC1111 counts it."""

    skipped: bool = Field(description="since the last request began")
    interrupted: bool = Field(description="since the last request began")
    stopping_generation: bool = Field(description="always false")
    job: str
    job_count: int = Field(description="images of the running requests")
    job_timestamp: str
    job_no: int = Field(description="of these, the ones that are drawn")
    sampling_step: int = Field(description="of the current image")
    sampling_steps: int


class ProgressResponse(BaseModel):
    """The progress of the images that this API key draws through AUTOMATIC1111's API."""

    progress: float = Field(description="in [0, 1]; 0: nothing is drawn")
    eta_relative: float = Field(description="an estimate of the seconds that are left")
    state: State
    current_image: str | None = Field(
        description="the last preview of the current image, in base64; a key that has not polled "
        f"within {POLL_SECONDS:g} s before its request gets no previews"
    )
    textinfo: str | None = Field(description="always null")


def routes(drawings: Drawings) -> APIRouter:
    """Return the routes over what is drawn."""
    router = APIRouter(prefix="/sdapi/v1")

    @router.get("/progress", responses={200: {"model": ProgressResponse}, **documented_errors(400)})
    async def progress(request: Request, skip_current_image: bool = False) -> Response:
        """Return the progress of what this API key draws."""
        running = drawings.of(request.state.key.name)
        if not skip_current_image:
            running.count_poll()
        return json_response(_progress(running, with_image=not skip_current_image))

    @router.post("/interrupt", responses=documented_errors())
    async def interrupt(request: Request) -> dict[str, str]:
        """End the requests of this API key; they return what is drawn."""
        drawings.of(request.state.key.name).interrupt()
        return {}

    @router.post("/skip", responses=documented_errors())
    async def skip(request: Request) -> dict[str, str]:
        """End the current image of this API key."""
        drawings.of(request.state.key.name).skip()
        return {}

    return router


def _progress(running: KeyDrawings, *, with_image: bool) -> ProgressResponse:
    images, current, started_at = running.images, running.current, running.started_at
    progress = eta = 0.0
    timestamp = "0"
    if started_at is not None:
        parts = sum(image.part_done for image in images) / len(images)
        progress = min(1.0, LEAST_PROGRESS + parts)
        seconds = max(0.0, time.time() - started_at)
        eta = seconds / progress - seconds
        timestamp = time.strftime("%Y%m%d%H%M%S", time.localtime(started_at))
    preview = current.preview if with_image and current else None
    return ProgressResponse(
        progress=progress,
        eta_relative=eta,
        state=State(
            skipped=running.skipped,
            interrupted=running.interrupted,
            stopping_generation=False,
            job=running.job,
            job_count=len(images),
            job_timestamp=timestamp,
            job_no=sum(image.has_ended for image in images),
            sampling_step=current.step if current else 0,
            sampling_steps=current.steps if current else 0,
        ),
        current_image=base64.b64encode(preview.file).decode() if preview else None,
        textinfo=None,
    )

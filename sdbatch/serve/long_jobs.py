"""Long jobs, images by URL, and the job file of a request."""

import asyncio

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse, Response

from sdbatch.serve import requests, responses
from sdbatch.serve.errors import Refusal
from sdbatch.serve.http import (
    DRAWING,
    base_url,
    documented,
    documented_errors,
    json_body,
    json_of,
    note,
)
from sdbatch.serve.requests import Generation
from sdbatch.serve.service import LongJob, Service


def routes(service: Service) -> APIRouter:
    """Return the routes over `service`."""
    router = APIRouter(prefix="/v1/images")
    _of_jobs(router, service)
    _of_files(router, service)
    return router


def _of_jobs(router: APIRouter, service: Service) -> None:
    offer = service.offer
    plain = requests.body_of(Generation, offer.job)

    @router.post(
        "/jobs",
        status_code=202,
        responses={202: {"model": responses.JobState}, **documented_errors(*DRAWING)},
        openapi_extra=documented(plain),
    )
    async def begin(request: Request) -> Response:
        """Take in a long job: its images are drawn later, and asked for at its poll_url."""
        asked = requests.read(
            requests.parse(plain, await json_body(request)), offer, request.state.key.limits
        )
        note(request, asked)
        name = service.begin(asked, request.state.key)
        state = responses.job_state(name, _job(service, name, request), service, base_url(request))
        headers = {"Location": state.poll_url, "Retry-After": "1"}
        return json_of(state, 202, headers)

    @router.get(
        "/jobs/{name}",
        responses={200: {"model": responses.JobState}, **documented_errors(404)},
    )
    async def poll(name: str, request: Request) -> Response:
        """Tell how far a long job is, and when it is done what came of it."""
        job = _job(service, name, request)
        return json_of(responses.job_state(name, job, service, base_url(request)))

    @router.post(
        "/jobs/{name}/cancel",
        responses={200: {"model": responses.JobState}, **documented_errors(404, 409)},
    )
    async def cancel(name: str, request: Request) -> Response:
        """Give up a long job; its lanes are free at the next tick."""
        job = _job(service, name, request)
        if job.task is None or job.task.done():
            text = f"job = {job.status}: has ended, so it can't be cancelled."
            raise Refusal(409, text, code="job_ended")
        job.task.cancel()
        await asyncio.wait([job.task])
        return json_of(responses.job_state(name, job, service, base_url(request)))


def _of_files(router: APIRouter, service: Service) -> None:
    offer = service.offer
    plain = requests.body_of(Generation, offer.job)

    @router.get(
        "/files/{name}",
        responses={
            200: {"content": {media: {} for media in responses.MEDIA.values()}},
            **documented_errors(404),
        },
        response_class=Response,
    )
    async def fetch(name: str) -> Response:
        """Return an image that was asked for by URL. Who knows its name needs no key."""
        kept = service.images.get(name)
        if kept is None:
            raise Refusal(404, "image = none of this name, or no longer.", code="not_found")
        file, media = kept
        headers = {"Cache-Control": "private, max-age=3600, immutable"}
        return Response(file, media_type=media, headers=headers)

    @router.post(
        "/job_file",
        responses={200: {"content": {"text/yaml": {}}}, **documented_errors(400, 404, 413, 415)},
        response_class=Response,
        openapi_extra=documented(plain),
    )
    async def job_file(request: Request) -> Response:
        """Return the job file whose batch run draws the images of this request; draws nothing."""
        asked = requests.read(
            requests.parse(plain, await json_body(request)), offer, request.state.key.limits
        )
        return PlainTextResponse(requests.job_file(asked, offer.job), media_type="text/yaml")


def _job(service: Service, name: str, request: Request) -> LongJob:
    job = service.jobs.get(name)
    if job is None or job.key != request.state.key.name:
        text = "job = none of this name, or no longer: jobs are kept in memory, and for a while."
        raise Refusal(404, text, code="not_found")
    return job

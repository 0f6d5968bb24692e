"""Routes of long jobs, of images by URL, and of the job file of a request."""

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse, Response

from sdbatch.registry import IMAGE_FORMATS
from sdbatch.serve import edits, requests, responses
from sdbatch.serve.errors import ApiError
from sdbatch.serve.http import (
    DRAW_ERRORS,
    base_url,
    checked_json_body,
    documented_body,
    documented_either,
    documented_errors,
    documented_form,
    json_response,
    set_log_fields,
)
from sdbatch.serve.jobs import LongJob
from sdbatch.serve.requests import Generation
from sdbatch.serve.service import Service


def routes(service: Service) -> APIRouter:
    """Return the routes over `service`."""
    router = APIRouter(prefix="/v1/images")
    generation = requests.body_with_defaults(Generation, service.model.job)
    _add_job_routes(router, service, generation)
    _add_file_routes(router, service, generation)
    return router


def _add_job_routes(router: APIRouter, service: Service, generation: type[Generation]) -> None:
    model = service.model

    @router.post(
        "/jobs",
        status_code=202,
        responses={202: {"model": responses.JobState}, **documented_errors(*DRAW_ERRORS)},
        openapi_extra=documented_either(
            documented_body(generation), documented_form(generation, *edits.FILES)
        ),
    )
    async def begin(request: Request) -> Response:
        """Accept a long job: its images are drawn later, and fetched from its poll_url.

        A form is an edit, as that of /v1/images/edits.
        """
        if request.headers.get("content-type", "").lower().startswith("multipart/"):
            image_request = await edits.read_edit(request, service, generation, edits.FILES)
        else:
            limits = request.state.key.limits
            _, image_request = await checked_json_body(
                request, generation, lambda body: requests.from_generation(body, model, limits)
            )
            set_log_fields(request, image_request)
        key = request.state.key
        reservation = service.reserve(image_request, key)
        job = await service.jobs.start(image_request, key.name, reservation)
        state = _state(service, job, request)
        headers = {"Location": state.poll_url, "Retry-After": "1"}
        return json_response(state, 202, headers)

    @router.get(
        "/jobs/{name}",
        responses={200: {"model": responses.JobState}, **documented_errors(404, 410, 503)},
    )
    async def poll(name: str, request: Request) -> Response:
        """Return the progress of a long job, and its images once it has completed."""
        job = await _find_job(service, name, request)
        return json_response(_state(service, job, request))

    @router.post(
        "/jobs/{name}/cancel",
        responses={200: {"model": responses.JobState}, **documented_errors(404, 409, 410, 503)},
    )
    async def cancel(name: str, request: Request) -> Response:
        """Cancel a long job; its lanes are released at the next tick."""
        job = await _find_job(service, name, request)
        await service.jobs.cancel(job)
        return json_response(_state(service, job, request))


def _add_file_routes(router: APIRouter, service: Service, generation: type[Generation]) -> None:
    model = service.model

    @router.get(
        "/files/{name}",
        responses={
            200: {"content": {each.media_type: {} for each in IMAGE_FORMATS.values()}},
            **documented_errors(404, 503),
        },
        response_class=Response,
    )
    async def fetch(name: str) -> Response:
        """Return an image that was requested by URL. Its name is secret, so no key is needed."""
        file = await service.stored_images.fetch(name)
        if file is None:
            text = "There is no image of this name, or no longer. Draw it again."
            raise ApiError(404, text, code="not_found")
        media_type = IMAGE_FORMATS[name.rpartition(".")[2]].media_type
        headers = {"Cache-Control": "private, max-age=3600, immutable"}
        return Response(file, media_type=media_type, headers=headers)

    @router.post(
        "/job_file",
        responses={200: {"content": {"text/yaml": {}}}, **documented_errors(400, 404, 413, 415)},
        response_class=Response,
        openapi_extra=documented_body(generation),
    )
    async def job_file(request: Request) -> Response:
        """Return the job file whose batch run draws the images of this request; draws nothing."""
        limits = request.state.key.limits
        _, image_request = await checked_json_body(
            request, generation, lambda body: requests.from_generation(body, model, limits)
        )
        text = requests.job_file(image_request, model.job)
        return PlainTextResponse(text, media_type="text/yaml")


async def _find_job(service: Service, name: str, request: Request) -> LongJob:
    job = await service.jobs.find(name)
    if job is None or job.key != request.state.key.name:
        text = (
            "There is no job of this name, or no longer: jobs are stored for a limited time. "
            "Start it again."
        )
        raise ApiError(404, text, code="not_found")
    return job


def _state(service: Service, job: LongJob, request: Request) -> responses.JobState:
    position = None if job.reservation is None else service.queue.position(job.reservation)
    return responses.job_state(job, position, service.model.name, base_url(request))

"""OpenAI's routes that begin with a picture: edits and variations, which are forms with files."""

from fastapi import APIRouter, Request
from fastapi.responses import Response

from sdbatch.serve import requests, responses
from sdbatch.serve.access import ApiKey
from sdbatch.serve.http import (
    DRAW_ERRORS,
    documented_errors,
    documented_form,
    read_form,
    set_log_fields,
)
from sdbatch.serve.openai import EVENTS, respond
from sdbatch.serve.pictures import Pictures, is_transparent, transparent_parts
from sdbatch.serve.requests import Generation, ImageRequest, Streamable, Variation
from sdbatch.serve.service import Service
from sdbatch.serve.validation import check

FILES = ("image", "mask")


def routes(service: Service) -> APIRouter:
    """Return the routes over `service`."""
    router = APIRouter(prefix="/v1/images")
    job = service.model.job
    edit = requests.body_with_defaults(Streamable, job)
    variation = requests.body_with_defaults(Variation, job)

    @router.post(
        "/edits",
        responses={
            200: {"model": responses.Images, "content": EVENTS},
            **documented_errors(*DRAW_ERRORS),
        },
        openapi_extra=documented_form(edit, *FILES),
    )
    async def draw_edit(request: Request) -> Response:
        """Draw a picture anew, or its masked parts; streamed as generations are."""
        image_request = await read_edit(request, service, edit, FILES)
        return await respond(request, service, image_request)

    @router.post(
        "/variations",
        responses={200: {"model": responses.Images}, **documented_errors(*DRAW_ERRORS)},
        openapi_extra=documented_form(variation, "image"),
    )
    async def draw_variations(request: Request) -> Response:
        """Draw a picture anew by `strength`, without a prompt unless there is one."""
        image_request = await read_edit(request, service, variation, ("image",))
        return await respond(request, service, image_request)

    return router


async def read_edit(
    request: Request, service: Service, kind: type[Generation], files: tuple[str, ...]
) -> ImageRequest:
    """Return the images that a form requests, with their pictures.

    As in OpenAI's API, the transparent parts of the picture of an edit are its mask, if there is no
    other and `mask_from_alpha` is not given.

    Raises:
        ApiError: as requests.from_generation, or a file is no picture, or does not fit.
    """
    key: ApiKey = request.state.key
    form = await read_form(request, kind, *files)
    values, picture = form.values, form.files.get("image")
    by_picture = "mask" in files and values.get("mask_from_alpha") is None
    if by_picture and "mask" not in form.files and picture is not None:
        with form.faults.collect():
            service.queue.check(1, key)
            transparent = await service.decode(is_transparent, picture, key)
            values = {**values, "mask_from_alpha": transparent}
    _, image_request = check(
        kind,
        values,
        lambda body: requests.from_generation(body, service.model, key.limits),
        form.faults,
    )
    set_log_fields(request, image_request)
    pictures = Pictures(form.files["image"], form.files.get("mask"), transparent_parts)
    return await service.prepare(image_request, pictures, key)

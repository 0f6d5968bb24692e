"""OpenAI's routes that begin with a picture: edits and variations, which are forms with files."""

from fastapi import APIRouter, Request
from fastapi.responses import Response

from sdbatch.serve import requests, responses
from sdbatch.serve.http import (
    DRAW_ERRORS,
    documented_errors,
    documented_form,
    form_body,
    set_log_fields,
)
from sdbatch.serve.openai import EVENTS, respond
from sdbatch.serve.pictures import Pictures, is_transparent, transparent_parts
from sdbatch.serve.requests import Generation, ImageRequest, Streamable, Variation
from sdbatch.serve.service import Service

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
    body, found = await form_body(request, kind, *files)
    by_picture = "mask" in files and "mask_from_alpha" not in body.model_fields_set
    if by_picture and "mask" not in found:
        transparent = await service.decode(is_transparent, found["image"])
        body = body.model_copy(update={"mask_from_alpha": transparent})
    image_request = requests.from_generation(body, service.model, request.state.key.limits)
    set_log_fields(request, image_request)
    pictures = Pictures(found["image"], found.get("mask"), transparent_parts)
    return await service.prepare(image_request, pictures)

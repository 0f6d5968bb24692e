"""AUTOMATIC1111's API: txt2img and img2img as its clients send them; the routes of its other parts.

Prompts are read as AUTOMATIC1111 reads them: with weights, and in chunks of 75 tokens.
"""

import base64
import json
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel

from sdbatch import samplers
from sdbatch.output.image_file import infotext
from sdbatch.serve import (
    a1111_lists,
    a1111_options,
    a1111_png_info,
    a1111_progress,
    a1111_requests,
)
from sdbatch.serve.a1111_bodies import Img2Img, Txt2Img
from sdbatch.serve.a1111_drawings import Drawings
from sdbatch.serve.drawer import DrawRequest, EncodedImage
from sdbatch.serve.errors import ApiError
from sdbatch.serve.http import (
    DRAW_ERRORS,
    cancel_on_disconnect,
    checked_json_body,
    documented_body,
    documented_errors,
    json_response,
    set_log_fields,
)
from sdbatch.serve.jobs import OnEvent
from sdbatch.serve.requests import ImageRequest
from sdbatch.serve.service import Service


class Images(BaseModel):
    """The response, as AUTOMATIC1111 sends it."""

    images: list[str]
    parameters: dict[str, Any]
    info: str


def routes(service: Service) -> APIRouter:
    """Return the routes over `service`."""
    drawings = Drawings()
    router = APIRouter()
    for part in (
        _draw_routes(service, drawings),
        a1111_progress.routes(drawings),
        a1111_options.routes(service.model),
        a1111_png_info.routes(service),
        a1111_lists.routes(service.model, service.started),
    ):
        router.include_router(part)
    return router


def _draw_routes(service: Service, drawings: Drawings) -> APIRouter:
    router = APIRouter(prefix="/sdapi/v1")
    model = service.model
    documented = {200: {"model": Images}, **documented_errors(*DRAW_ERRORS, 409)}

    async def respond(
        request: Request, job: str, image_request: ImageRequest, parameters: dict[str, Any]
    ) -> Response:
        """Draw the images of a request and return them; `job` is AUTOMATIC1111's name of it."""
        key = request.state.key
        with (
            service.reserve(image_request, key) as reservation,
            drawings.of(key.name).running(job, image_request) as drawing,
        ):

            async def draw(one: ImageRequest, on_event: OnEvent) -> list[EncodedImage]:
                return await service.draw(one, reservation, on_event)

            drawn = await cancel_on_disconnect(request, drawing.run(draw))
        return json_response(_images(drawn, parameters))

    @router.post("/txt2img", responses=documented, openapi_extra=documented_body(Txt2Img))
    async def txt2img(request: Request) -> Response:
        """Draw images."""
        limits = request.state.key.limits
        body, image_request = await checked_json_body(
            request, Txt2Img, lambda body: a1111_requests.from_txt2img(body, model, limits)
        )
        set_log_fields(request, image_request)
        return await respond(request, "scripts_txt2img", image_request, body.model_dump())

    @router.post("/img2img", responses=documented, openapi_extra=documented_body(Img2Img))
    async def img2img(request: Request) -> Response:
        """Draw images from a picture, or its masked part anew."""
        key = request.state.key
        body, image_request = await checked_json_body(
            request, Img2Img, lambda body: a1111_requests.from_img2img(body, model, key.limits)
        )
        set_log_fields(request, image_request)
        service.queue.check(len(image_request.draw_requests), key)
        pictures = await service.decode(a1111_requests.pictures_of, body, key)
        image_request = await service.prepare(image_request, pictures, key)
        parameters = body.model_dump()
        if not body.include_init_images:
            parameters |= {"init_images": None, "mask": None}
        return await respond(request, "scripts_img2img", image_request, parameters)

    return router


def _images(drawn: list[tuple[DrawRequest, EncodedImage]], parameters: dict[str, Any]) -> Images:
    """Return the response; raises an ApiError if the request was ended before it had an image."""
    if not drawn:
        text = "The request was interrupted before it had an image. Send it again."
        raise ApiError(409, text, code="interrupted")
    return Images(
        images=[base64.b64encode(image.file).decode() for _, image in drawn],
        parameters=parameters,
        info=json.dumps(_info(drawn, parameters["batch_size"])),
    )


def _info(drawn: list[tuple[DrawRequest, EncodedImage]], batch_size: int) -> dict[str, Any]:
    first = drawn[0][0].request
    images = [image for _, image in drawn]
    parameters = [_parameters(draw_request) for draw_request, _ in drawn]
    seeds = [each["seed"] for each in parameters]
    subseeds = [each["variation_seed"] if first.variation_strength else -1 for each in parameters]
    second = first.enlarged()
    facts = images[0].facts
    return {
        "prompt": first.prompt,
        "all_prompts": [first.prompt] * len(seeds),
        "negative_prompt": first.negative_prompt,
        "all_negative_prompts": [first.negative_prompt] * len(seeds),
        "seed": first.seed,
        "all_seeds": seeds,
        "subseed": subseeds[0],
        "all_subseeds": subseeds,
        "subseed_strength": first.variation_strength,
        "width": facts.width,
        "height": facts.height,
        "sampler_name": samplers.title(first.sampler),
        "cfg_scale": first.guidance_scale,
        "steps": first.num_inference_steps,
        "batch_size": batch_size,
        "denoising_strength": first.strength if first.inputs else second and second.strength,
        "sd_model_name": parameters[0]["model"],
        "sd_model_hash": parameters[0]["model_hash"][:10],
        "clip_skip": first.clip_skip + 1,
        "index_of_first_image": 0,
        "infotexts": [infotext(each) for each in parameters],
        "version": parameters[0]["software"],
        "exact": [image.facts.exact and not image.preview for image in images],
        "finished": [not image.preview for image in images],  # not ended early
    }


def _parameters(draw_request: DrawRequest) -> dict[str, Any]:
    """Return the values that the text in an image's file is made of."""
    encoding = draw_request.encoding
    return {
        **draw_request.request.model_dump(exclude={"inputs"}),
        **draw_request.hashes,
        "model": encoding.model,
        "model_hash": encoding.model_hash,
        "software": encoding.software,
    }

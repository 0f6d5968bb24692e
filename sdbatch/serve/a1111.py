"""AUTOMATIC1111's API: txt2img and img2img as its clients send them, and what they list first.

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
from sdbatch.sampling import LATENT_UPSCALERS, PICTURE_UPSCALERS
from sdbatch.serve import a1111_requests
from sdbatch.serve.a1111_bodies import SCHEDULES, UPSCALERS, Img2Img, Txt2Img
from sdbatch.serve.drawer import DrawRequest, EncodedImage
from sdbatch.serve.http import (
    DRAW_ERRORS,
    cancel_on_disconnect,
    checked_json_body,
    documented_body,
    documented_errors,
    json_response,
    set_log_fields,
)
from sdbatch.serve.requests import ImageRequest, ServedModel
from sdbatch.serve.service import Service

EMPTY_LISTS = (  # routes of what this service does not have
    "/sd-vae",
    "/hypernetworks",
    "/face-restorers",
    "/prompt-styles",
)


class Images(BaseModel):
    """The response, as AUTOMATIC1111 sends it."""

    images: list[str]
    parameters: dict[str, Any]
    info: str


def routes(service: Service) -> APIRouter:
    """Return the routes over `service`."""
    router = APIRouter(prefix="/sdapi/v1")
    model = service.model
    documented = {200: {"model": Images}, **documented_errors(*DRAW_ERRORS)}

    @router.post("/txt2img", responses=documented, openapi_extra=documented_body(Txt2Img))
    async def txt2img(request: Request) -> Response:
        """Draw images."""
        limits = request.state.key.limits
        body, image_request = await checked_json_body(
            request, Txt2Img, lambda body: a1111_requests.from_txt2img(body, model, limits)
        )
        set_log_fields(request, image_request)
        return await _respond(request, service, image_request, body.model_dump())

    @router.post("/img2img", responses=documented, openapi_extra=documented_body(Img2Img))
    async def img2img(request: Request) -> Response:
        """Draw images from a picture, or its masked part anew."""
        limits = request.state.key.limits
        body, image_request = await checked_json_body(
            request, Img2Img, lambda body: a1111_requests.from_img2img(body, model, limits)
        )
        set_log_fields(request, image_request)
        pictures = await service.decode(a1111_requests.pictures_of, body)
        image_request = await service.prepare(image_request, pictures)
        parameters = body.model_dump()
        if not body.include_init_images:
            parameters |= {"init_images": None, "mask": None}
        return await _respond(request, service, image_request, parameters)

    for path, content in discovery(model).items():
        router.add_api_route(
            path, _constant_route(content), methods=["GET"], responses=documented_errors()
        )
    return router


def discovery(model: ServedModel) -> dict[str, Any]:
    """Return the responses of the routes that clients call first, by their paths."""
    return {
        "/samplers": [
            {"name": samplers.title(each), "aliases": [each], "options": {}}
            for each in samplers.NAMES
        ],
        "/schedulers": [
            {
                "name": schedule or "automatic",
                "label": label,
                "aliases": None,
                "default_rho": -1,
                "need_inner_model": False,
            }
            for schedule, label in SCHEDULES.items()
        ],
        "/sd-models": [_checkpoint(name, model) for name in model.names],
        "/options": {"sd_model_checkpoint": model.name, "samples_format": "png", "eta_ddim": 0.0},
        "/embeddings": {
            "loaded": {each.token: {} for each in model.job.model.embeddings},
            "skipped": {},
        },
        "/loras": [
            {"name": lora, "alias": lora, "path": "", "metadata": {}}
            for lora in model.job.model.row_loras
        ],
        "/latent-upscale-modes": [{"name": UPSCALERS[name]} for name in LATENT_UPSCALERS],
        "/upscalers": [_upscaler(UPSCALERS[name]) for name in PICTURE_UPSCALERS],
        **{path: [] for path in EMPTY_LISTS},
        "/scripts": {"txt2img": [], "img2img": []},
        "/cmd-flags": {"api": True},
    }


def _checkpoint(name: str, model: ServedModel) -> dict[str, Any]:
    return {
        "title": name,
        "model_name": name,
        "hash": model.encoding.model_hash[:10] or None,
        "sha256": model.job.model.sha256,
        "filename": name,
        "config": None,
    }


def _upscaler(name: str) -> dict[str, Any]:
    files = {"model_name": None, "model_path": None, "model_url": None}
    return {"name": name, **files, "scale": 4}


def _constant_route(content: Any) -> Any:
    async def answer() -> Any:
        return content

    return answer


async def _respond(
    request: Request, service: Service, image_request: ImageRequest, parameters: dict[str, Any]
) -> Response:
    """Draw the images of a request and return them."""
    with service.reserve(image_request, request.state.key) as reservation:
        images = await cancel_on_disconnect(request, service.draw(image_request, reservation))
    return json_response(
        Images(
            images=[base64.b64encode(image.file).decode() for image in images],
            parameters=parameters,
            info=json.dumps(_info(image_request, images, parameters["batch_size"])),
        )
    )


def _info(
    image_request: ImageRequest, images: list[EncodedImage], batch_size: int
) -> dict[str, Any]:
    first = image_request.first
    parameters = [_parameters(each) for each in image_request.draw_requests]
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
        "exact": [image.facts.exact for image in images],
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

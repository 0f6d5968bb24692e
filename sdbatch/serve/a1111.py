"""POST /sdapi/v1/txt2img as AUTOMATIC1111's clients send it.

Fields that this service does not support are rejected unless they hold their no-op default.
Prompts are read as AUTOMATIC1111 reads them: with weights, and in chunks of 75 tokens.
"""

import base64
import json
import secrets
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    create_model,
)

from sdbatch import samplers
from sdbatch.engine.request import Request as EngineRequest
from sdbatch.job import Limits, Sampling
from sdbatch.output.image_file import infotext
from sdbatch.sampling import KEYS, MAX_SEED
from sdbatch.serve import requests
from sdbatch.serve.drawer import DrawRequest, EncodedImage
from sdbatch.serve.errors import invalid_body, invalid_value, model_not_found
from sdbatch.serve.http import (
    DRAW_ERRORS,
    cancel_on_disconnect,
    documented_body,
    documented_errors,
    json_body,
    json_response,
    set_log_fields,
)
from sdbatch.serve.requests import (
    FORMATS,
    MAX_PROMPT_CHARACTERS,
    RANDOM_SEEDS,
    ImageRequest,
    ServedModel,
)
from sdbatch.serve.service import Service

SCHEDULES = {"": "Automatic", **samplers.SUFFIXES}  # our names -> AUTOMATIC1111's
EMPTY_LISTS = (  # routes of what this service does not have
    "/sd-vae",
    "/upscalers",
    "/hypernetworks",
    "/face-restorers",
    "/prompt-styles",
)
PARAMETERS = {name: key.a1111_parameter for name, key in KEYS.items() if key.a1111_parameter}
FILE_FORMATS = {**{name: name for name in FORMATS.values()}, **FORMATS}  # jpg and jpeg -> jpg
if TYPE_CHECKING:
    FileFormat: TypeAlias = str
else:
    FileFormat = Literal[tuple(FILE_FORMATS)]


def _only(value: bool) -> tuple[AfterValidator, WithJsonSchema]:
    """Require a boolean to be `value`. Not a Literal: pydantic would accept 0 for False."""

    def check(given: bool) -> bool:
        if given is not value:
            raise ValueError(f"must be {str(value).lower()}, the only supported value")
        return given

    return AfterValidator(check), WithJsonSchema({"type": "boolean", "const": value})


OnlyTrue = Annotated[bool, *_only(True)]
OnlyFalse = Annotated[bool, *_only(False)] | None
EmptyList = Annotated[list[Any], Field(max_length=0)] | None
EmptyMapping = Annotated[dict[str, Any], Field(max_length=0)] | None


class Settings(BaseModel):
    """The supported part of override_settings."""

    model_config = ConfigDict(extra="forbid", strict=True)

    CLIP_stop_at_last_layers: int = Field(1, ge=1, le=100)
    sd_model_checkpoint: str | None = None
    samples_format: FileFormat = "png"
    eta_ddim: float = Field(0, ge=0, le=1)


class _Txt2Img(BaseModel):
    """The body of POST /sdapi/v1/txt2img, without the fields of sampling keys."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str = Field("", max_length=MAX_PROMPT_CHARACTERS)
    negative_prompt: str | None = Field("", max_length=MAX_PROMPT_CHARACTERS)
    seed: int = Field(-1, ge=-1, le=MAX_SEED, description="-1: random")
    sampler_name: str | None = Field(None, description="a name from GET /sdapi/v1/samplers")
    sampler_index: str | None = Field(None, description="the same, as older clients call it")
    scheduler: str | None = Field(None, description="a label from GET /sdapi/v1/schedulers")
    batch_size: int = Field(1, ge=1, le=100)
    n_iter: int = Field(1, ge=1, le=100)
    override_settings: Settings = Field(default_factory=Settings)
    override_settings_restore_afterwards: bool | None = True
    send_images: OnlyTrue = True
    # fields that are not supported, with their no-op defaults
    styles: EmptyList = None
    subseed: int = Field(-1, description="has no effect without subseed_strength")
    subseed_strength: float = Field(0, ge=0, le=0)
    seed_resize_from_h: int = Field(-1, le=0)
    seed_resize_from_w: int = Field(-1, le=0)
    restore_faces: OnlyFalse = None
    tiling: OnlyFalse = None
    enable_hr: OnlyFalse = False
    save_images: OnlyFalse = False
    do_not_save_samples: bool | None = None
    do_not_save_grid: bool | None = None
    refiner_checkpoint: Literal[""] | None = None
    script_name: Literal[""] | None = None
    script_args: EmptyList = None
    alwayson_scripts: EmptyMapping = None


def _sampling_fields() -> dict[str, Any]:
    """Return the fields of sampling keys: as in the job, but null means the job's value."""
    fields = {}
    for name, parameter in PARAMETERS.items():
        key = Sampling.model_fields[name]
        field = Field(None, description=key.description)
        fields[parameter] = (key.rebuild_annotation() | None, field)
    return fields


Txt2Img: type[_Txt2Img] = create_model(
    "Txt2Img",
    __base__=_Txt2Img,
    __doc__="The body of POST /sdapi/v1/txt2img.",
    **_sampling_fields(),
)


class Txt2ImgResponse(BaseModel):
    """The response, as AUTOMATIC1111 sends it."""

    images: list[str]
    parameters: dict[str, Any]
    info: str


def routes(service: Service) -> APIRouter:
    """Return the routes over `service`."""
    router = APIRouter(prefix="/sdapi/v1")
    model = service.model

    @router.post(
        "/txt2img",
        responses={200: {"model": Txt2ImgResponse}, **documented_errors(*DRAW_ERRORS)},
        openapi_extra=documented_body(Txt2Img),
    )
    async def txt2img(request: Request) -> Response:
        """Draw images."""
        body = await json_body(request, Txt2Img)
        image_request = from_txt2img(body, model, request.state.key.limits)
        set_log_fields(request, image_request)
        with service.reserve(len(image_request.draw_requests), request.state.key):
            images = await cancel_on_disconnect(request, service.draw(image_request))
        return json_response(_response(body, image_request, images))

    for path, content in discovery(model).items():
        router.add_api_route(
            path, _constant_route(content), methods=["GET"], responses=documented_errors()
        )
    return router


def from_txt2img(body: _Txt2Img, model: ServedModel, limits: Limits) -> ImageRequest:
    """Return the images that `body` requests; raises as requests.from_generation does."""
    settings = body.override_settings
    checkpoint = settings.sd_model_checkpoint
    if checkpoint is not None and checkpoint != model.name:
        raise model_not_found("override_settings.sd_model_checkpoint", checkpoint, model.name)
    images = body.batch_size * body.n_iter
    try:
        first = EngineRequest.model_validate(_request_values(body, model.job.sampling))
    except ValidationError as error:
        raise invalid_body(error) from error
    first = requests.with_lora_weights(first, model.job)
    requests.check_limits(first, images, limits)
    encoding = model.encoding_for(FILE_FORMATS[settings.samples_format])
    return ImageRequest(requests.repeat(DrawRequest(first, encoding), images))


def discovery(model: ServedModel) -> dict[str, Any]:
    """Return the responses of the routes that clients call first, by their paths."""
    name = model.name
    checkpoint = {
        "title": name,
        "model_name": name,
        "hash": model.encoding.model_hash[:10] or None,
        "sha256": model.job.model.sha256,
        "filename": name,
        "config": None,
    }
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
        "/sd-models": [checkpoint],
        "/options": {"sd_model_checkpoint": name, "samples_format": "png", "eta_ddim": 0.0},
        "/embeddings": {
            "loaded": {each.token: {} for each in model.job.model.embeddings},
            "skipped": {},
        },
        "/loras": [
            {"name": lora, "alias": lora, "path": "", "metadata": {}}
            for lora in model.job.model.row_loras
        ],
        **{path: [] for path in EMPTY_LISTS},
        "/scripts": {"txt2img": [], "img2img": []},
        "/cmd-flags": {"api": True},
    }


def _constant_route(content: Any) -> Any:
    async def answer() -> Any:
        return content

    return answer


def _request_values(body: _Txt2Img, sampling: Sampling) -> dict[str, Any]:
    """Return the values of the first image's request: those of `body`, else the job's."""
    settings = body.override_settings
    values = sampling.model_dump()
    if settings.eta_ddim:
        values["eta"] = settings.eta_ddim
    for name, parameter in PARAMETERS.items():
        value = getattr(body, parameter)
        if value is not None:
            values[name] = value
    return {
        **values,
        "prompt": body.prompt,
        "negative_prompt": body.negative_prompt or "",
        "sampler": _sampler(body, sampling.sampler),
        "seed": secrets.randbelow(RANDOM_SEEDS) if body.seed == -1 else body.seed,
        "clip_skip": settings.CLIP_stop_at_last_layers - 1,
        "prompt_weights": True,
        "chunk_prompts": True,
    }


def _sampler(body: _Txt2Img, default: str) -> str:
    """Return our name of the sampler, which AUTOMATIC1111 names in one field or in two."""
    title, label = body.sampler_name or body.sampler_index, (body.scheduler or "").lower()
    if title is None and body.scheduler is None:
        return default
    name = default if title is None else samplers.find(title)
    if name is None:
        raise invalid_value(
            "sampler_name", f"{title!r}: must be a name from GET /sdapi/v1/samplers"
        )
    schedules = {label.lower(): schedule for schedule, label in SCHEDULES.items()}
    schedule = schedules.get(label, label)
    if schedule not in SCHEDULES:
        raise invalid_value(
            "scheduler", f"{body.scheduler!r}: must be a label from GET /sdapi/v1/schedulers"
        )
    if not schedule:
        return name
    plain = name if name in samplers.SAMPLERS else name.rpartition("_")[0]
    full_name = f"{plain}_{schedule}"
    if full_name not in samplers.NAMES:
        raise invalid_value(
            "scheduler", f"{body.scheduler!r}: {samplers.title(plain)} has no such schedule"
        )
    return full_name


def _response(
    body: _Txt2Img, image_request: ImageRequest, images: list[EncodedImage]
) -> Txt2ImgResponse:
    first = image_request.first
    parameters = [_parameters(each) for each in image_request.draw_requests]
    seeds = [each["seed"] for each in parameters]
    info = {
        "prompt": first.prompt,
        "all_prompts": [first.prompt] * len(seeds),
        "negative_prompt": first.negative_prompt,
        "all_negative_prompts": [first.negative_prompt] * len(seeds),
        "seed": first.seed,
        "all_seeds": seeds,
        "subseed": -1,
        "subseed_strength": 0,
        "width": first.width,
        "height": first.height,
        "sampler_name": samplers.title(first.sampler),
        "cfg_scale": first.guidance_scale,
        "steps": first.num_inference_steps,
        "batch_size": body.batch_size,
        "sd_model_name": parameters[0]["model"],
        "sd_model_hash": parameters[0]["model_hash"][:10],
        "clip_skip": first.clip_skip + 1,
        "index_of_first_image": 0,
        "infotexts": [infotext(each) for each in parameters],
        "version": parameters[0]["software"],
        "exact": [image.facts.exact for image in images],
    }
    return Txt2ImgResponse(
        images=[base64.b64encode(image.file).decode() for image in images],
        parameters=body.model_dump(),
        info=json.dumps(info),
    )


def _parameters(draw_request: DrawRequest) -> dict[str, Any]:
    """Return the values that the text in an image's file is made of."""
    encoding = draw_request.encoding
    return {
        **draw_request.request.model_dump(exclude={"inputs"}),
        "model": encoding.model,
        "model_hash": encoding.model_hash,
        "software": encoding.software,
    }

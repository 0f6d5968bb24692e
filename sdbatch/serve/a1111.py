"""POST /sdapi/v1/txt2img as AUTOMATIC1111's clients send it.

What such a client sends and this service has not is refused, unless it stands at the value that
changes nothing. Prompts are read as AUTOMATIC1111 reads them: weights, and chunks of 75 tokens.
"""

import base64
import json
import secrets
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import core_schema

from sdbatch import samplers
from sdbatch.engine.request import Request as Drawing
from sdbatch.job import Limits, Sampling
from sdbatch.output.image_file import infotext
from sdbatch.serve import requests
from sdbatch.serve.drawer import Asked, Picture
from sdbatch.serve.errors import Refusal
from sdbatch.serve.http import (
    DRAWING,
    documented,
    documented_errors,
    json_body,
    json_of,
    note,
    unless_gone,
)
from sdbatch.serve.requests import LONGEST, SEEDS, Offer, Wanted, bad
from sdbatch.serve.service import Service


@dataclass(frozen=True)
class Only:
    """A switch that must stand at `value`; of a Literal pydantic would take 0 for False."""

    value: bool

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """Return what pydantic validates by."""
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        """Return what the documents say."""
        return {"type": "boolean", "const": self.value}

    def _check(self, given: bool) -> bool:
        if given is not self.value:
            raise ValueError(f"must be {str(self.value).lower()}: this service has nothing else")
        return given


Off = Annotated[bool, Only(False)] | None
Nothing = Annotated[list[Any], Field(max_length=0)] | None
Empty = Annotated[dict[str, Any], Field(max_length=0)] | None
SCHEDULES = {"": "Automatic", **samplers.SUFFIXES}  # our names and theirs


class Settings(BaseModel):
    """Of override_settings, what can be asked here."""

    model_config = ConfigDict(extra="forbid", strict=True)

    CLIP_stop_at_last_layers: int = Field(1, ge=1, le=100)
    sd_model_checkpoint: str | None = None
    samples_format: Literal["png", "jpg", "jpeg", "webp"] = "png"
    eta_ddim: float = Field(0, ge=0, le=1)


class Txt2Img(BaseModel):
    """The body of POST /sdapi/v1/txt2img."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str = Field("", max_length=LONGEST)
    negative_prompt: str | None = Field("", max_length=LONGEST)
    seed: int = Field(-1, ge=-1, le=2**63 - 1, description="-1: any")
    sampler_name: str | None = Field(None, description="a name of GET /sdapi/v1/samplers")
    sampler_index: str | None = Field(None, description="the same, as older clients call it")
    scheduler: str | None = Field(None, description="a label of GET /sdapi/v1/schedulers")
    steps: int | None = Field(None, ge=1, le=999)
    cfg_scale: float | None = Field(None, ge=1, le=1000)
    width: int | None = Field(None, ge=8, le=4096, multiple_of=8)
    height: int | None = Field(None, ge=8, le=4096, multiple_of=8)
    batch_size: int = Field(1, ge=1, le=100)
    n_iter: int = Field(1, ge=1, le=100)
    eta: float | None = Field(None, ge=0, le=1)
    override_settings: Settings = Field(default_factory=Settings)
    override_settings_restore_afterwards: bool | None = True
    send_images: Annotated[bool, Only(True)] = True
    # what this service has not, at the values that change nothing
    styles: Nothing = None
    subseed: int = Field(-1, description="has no effect without subseed_strength")
    subseed_strength: float = Field(0, ge=0, le=0)
    seed_resize_from_h: int = Field(-1, le=0)
    seed_resize_from_w: int = Field(-1, le=0)
    restore_faces: Off = None
    tiling: Off = None
    enable_hr: Off = False
    save_images: Off = False
    do_not_save_samples: bool | None = None
    do_not_save_grid: bool | None = None
    refiner_checkpoint: Literal[""] | None = None
    script_name: Literal[""] | None = None
    script_args: Nothing = None
    alwayson_scripts: Empty = None


class Answer(BaseModel):
    """What AUTOMATIC1111 answers."""

    images: list[str]
    parameters: dict[str, Any]
    info: str


def routes(service: Service) -> APIRouter:
    """Return the routes over `service`."""
    router = APIRouter(prefix="/sdapi/v1")
    offer = service.offer

    @router.post(
        "/txt2img",
        responses={200: {"model": Answer}, **documented_errors(*DRAWING)},
        openapi_extra=documented(Txt2Img),
    )
    async def txt2img(request: Request) -> Response:
        """Draw images."""
        try:
            body = Txt2Img.model_validate_json(await json_body(request))
        except ValidationError as error:
            raise requests.unreadable(error) from error
        asked = read(body, offer, request.state.key.limits)
        note(request, asked)
        with service.take(len(asked.asked), request.state.key):
            pictures = await unless_gone(request, service.draw(asked))
        return json_of(_answer(body, asked, pictures))

    for path, listed in discovery(offer).items():
        router.add_api_route(path, _route(listed), methods=["GET"], responses=documented_errors())
    return router


def read(body: Txt2Img, offer: Offer, limits: Limits) -> Wanted:
    """Return the images that `body` asks for; raises a Refusal as requests.read does."""
    own = body.override_settings
    if own.sd_model_checkpoint not in (None, offer.model):
        text = f"sd_model_checkpoint = {own.sd_model_checkpoint!r}: only {offer.model} is served."
        raise Refusal(404, text, code="model_not_found", param="override_settings")
    values = offer.job.sampling.model_dump()
    given = {
        "num_inference_steps": body.steps,
        "guidance_scale": body.cfg_scale,
        "width": body.width,
        "height": body.height,
        "eta": body.eta if body.eta is not None else own.eta_ddim or None,
        "sampler": _sampler(body, offer.job.sampling.sampler),
    }
    values |= {name: value for name, value in given.items() if value is not None}
    values |= {
        "negative_prompt": body.negative_prompt or "",
        "seed": secrets.randbelow(SEEDS) if body.seed == -1 else body.seed,
        "clip_skip": own.CLIP_stop_at_last_layers - 1,
        "prompt_weights": True,
        "chunk_prompts": True,
    }
    try:
        sampling = Sampling.model_validate(values)
    except ValidationError as error:
        raise requests.unreadable(error) from error
    images = body.batch_size * body.n_iter
    requests.check(sampling, images, limits)
    if sampling.seed > 2**63 - images:
        raise bad("seed", f"{sampling.seed}: must leave room for {images} images below 2**63")
    form = {"jpeg": "jpg"}.get(own.samples_format, own.samples_format)
    first = Drawing(prompt=body.prompt, **sampling.model_dump())
    return Wanted(requests.copies(first, images, requests.encoded_as(offer, form)))


def discovery(offer: Offer) -> dict[str, Any]:
    """Return what the discovery routes answer, by their paths."""
    name = offer.model
    model = {
        "title": name,
        "model_name": name,
        "hash": offer.encoding.model_hash[:10] or None,
        "sha256": offer.job.model.sha256,
        "filename": name,
        "config": None,
    }
    schedules = [
        {
            "name": key or "automatic",
            "label": label,
            "aliases": None,
            "default_rho": -1,
            "need_inner_model": False,
        }
        for key, label in SCHEDULES.items()
    ]
    return {
        "/samplers": [
            {"name": samplers.title(each), "aliases": [each], "options": {}}
            for each in samplers.NAMES
        ],
        "/schedulers": schedules,
        "/sd-models": [model],
        "/options": {"sd_model_checkpoint": name, "samples_format": "png", "eta_ddim": 0.0},
        "/embeddings": {
            "loaded": {each.token: {} for each in offer.job.model.embeddings},
            "skipped": {},
        },
        **{
            path: []
            for path in (
                "/sd-vae",
                "/loras",
                "/upscalers",
                "/hypernetworks",
                "/face-restorers",
                "/prompt-styles",
            )
        },
        "/scripts": {"txt2img": [], "img2img": []},
        "/cmd-flags": {"api": True},
    }


def _route(listed: Any) -> Any:
    async def answer() -> Any:
        return listed

    return answer


def _sampler(body: Txt2Img, default: str) -> str | None:
    """Return our name of the sampler, which AUTOMATIC1111 names in one field or in two."""
    title, scheduler = body.sampler_name or body.sampler_index, body.scheduler
    if title is None and scheduler is None:
        return None
    names = {samplers.title(name).lower(): name for name in samplers.NAMES}
    name = default if title is None else names.get(title.lower(), title)
    if name not in samplers.NAMES:
        text = f"{title!r}: none of GET /sdapi/v1/samplers"
        raise bad("sampler_name", text)
    schedules = {label.lower(): key for key, label in SCHEDULES.items()}
    wish = schedules.get((scheduler or "").lower(), (scheduler or "").lower())
    if wish not in SCHEDULES:
        raise bad("scheduler", f"{scheduler!r}: none of GET /sdapi/v1/schedulers")
    if not wish:
        return name
    plain = name if name in samplers.SAMPLERS else name.rpartition("_")[0]
    full = f"{plain}_{wish}"
    if full not in samplers.NAMES:
        raise bad("scheduler", f"{scheduler!r}: {samplers.title(plain)} has no such schedule")
    return full


def _answer(body: Txt2Img, asked: Wanted, pictures: list[Picture]) -> Answer:
    first = asked.first
    said = [_said(each) for each in asked.asked]
    seeds = [each.request.seed for each in asked.asked]
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
        "sd_model_name": said[0]["model"],
        "sd_model_hash": said[0]["model_hash"][:10],
        "clip_skip": first.clip_skip + 1,
        "index_of_first_image": 0,
        "infotexts": [infotext(each) for each in said],
        "version": said[0]["software"],
        "exact": [picture.exact for picture in pictures],
    }
    return Answer(
        images=[base64.b64encode(picture.file).decode() for picture in pictures],
        parameters=body.model_dump(),
        info=json.dumps(info),
    )


def _said(asked: Asked) -> dict[str, Any]:
    encoding = asked.encoding
    return {
        **asdict(asked.request),
        "model": encoding.model,
        "model_hash": encoding.model_hash,
        "software": encoding.software,
    }

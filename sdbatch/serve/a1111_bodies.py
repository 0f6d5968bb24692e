"""The bodies of AUTOMATIC1111's API, and the images that they request.

Fields that this service does not support are rejected unless they hold their no-op default. What a
request leaves out has the job's value, not AUTOMATIC1111's default.
"""

import secrets
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, cast

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
from sdbatch.engine.request import Request
from sdbatch.job import Limits, Sampling
from sdbatch.sampling import KEYS, MAX_SEED, SIDE_MULTIPLE
from sdbatch.serve import pictures, requests
from sdbatch.serve.drawer import DrawRequest
from sdbatch.serve.errors import invalid_body, invalid_value, model_not_found
from sdbatch.serve.pictures import Pictures
from sdbatch.serve.requests import (
    FORMATS,
    MAX_PROMPT_CHARACTERS,
    RANDOM_SEEDS,
    ImageRequest,
    ServedModel,
)

SCHEDULES = {"": "Automatic", **samplers.SUFFIXES}  # our names -> AUTOMATIC1111's
UPSCALERS = {  # our names -> AUTOMATIC1111's
    "latent": "Latent",
    "latent_antialiased": "Latent (antialiased)",
    "latent_bicubic": "Latent (bicubic)",
    "latent_bicubic_antialiased": "Latent (bicubic antialiased)",
    "latent_nearest": "Latent (nearest)",
    "latent_nearest_exact": "Latent (nearest-exact)",
    "lanczos": "Lanczos",
    "nearest": "Nearest",
}
FITS = ("stretch", "crop", "pad")  # by resize_mode
MASK_FILLS = ("fill", "original", "noise", "nothing")  # by inpainting_fill
DEFAULT_HIRES_SCALE, DEFAULT_MASK_BLUR = 2.0, 4  # AUTOMATIC1111's
PARAMETERS = {name: key.a1111_parameter for name, key in KEYS.items() if key.a1111_parameter}
IMG2IMG_KEYS = ("strength", "mask_blur", "image_guidance_scale")  # of img2img alone
TXT2IMG_KEYS = ("hires_scale", "hires_upscaler", "hires_steps")  # of txt2img alone
SHARED_KEYS = tuple(
    name for name in PARAMETERS if name not in (*IMG2IMG_KEYS, *TXT2IMG_KEYS, "variation_seed")
)
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


def _only_one() -> tuple[AfterValidator, WithJsonSchema]:
    """Require a list to have one item."""

    def check(given: list[str]) -> list[str]:
        if len(given) != 1:
            raise ValueError("must be a list of one picture. Send a request for each")
        return given

    items = {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 1}
    return AfterValidator(check), WithJsonSchema(items)


OnlyTrue = Annotated[bool, *_only(True)]
OnlyFalse = Annotated[bool, *_only(False)] | None
EmptyList = Annotated[list[Any], Field(max_length=0)] | None
EmptyMapping = Annotated[dict[str, Any], Field(max_length=0)] | None
Switch = bool | Annotated[int, Field(ge=0, le=1)] | None


class Settings(BaseModel):
    """The supported part of override_settings."""

    model_config = ConfigDict(extra="forbid", strict=True)

    CLIP_stop_at_last_layers: int = Field(1, ge=1, le=100)
    sd_model_checkpoint: str | None = None
    samples_format: FileFormat = "png"
    eta_ddim: float = Field(0, ge=0, le=1)


class Body(BaseModel):
    """What both bodies have, without the fields of sampling keys."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str = Field("", max_length=MAX_PROMPT_CHARACTERS)
    negative_prompt: str | None = Field("", max_length=MAX_PROMPT_CHARACTERS)
    seed: int = Field(-1, ge=-1, le=MAX_SEED, description="-1: random")
    subseed: int = Field(
        -1, ge=-1, le=MAX_SEED, description="-1: random; no effect without subseed_strength"
    )
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
    seed_resize_from_h: int = Field(-1, le=0)
    seed_resize_from_w: int = Field(-1, le=0)
    restore_faces: OnlyFalse = None
    tiling: OnlyFalse = None
    save_images: OnlyFalse = False
    do_not_save_samples: bool | None = None
    do_not_save_grid: bool | None = None
    refiner_checkpoint: Literal[""] | None = None
    script_name: Literal[""] | None = None
    script_args: EmptyList = None
    alwayson_scripts: EmptyMapping = None


class _Txt2Img(Body):
    """The body of POST /sdapi/v1/txt2img, without the fields of sampling keys."""

    enable_hr: bool | None = Field(
        None, description="hires fix; the other fields of it have no effect without it"
    )
    denoising_strength: float | None = Field(None, description="of hires fix")
    hr_scale: float | None = None
    hr_upscaler: str | None = Field(
        None,
        description="a name from GET /sdapi/v1/latent-upscale-modes or GET /sdapi/v1/upscalers",
    )
    hr_second_pass_steps: int | None = Field(None, description="0: as many as `steps`")
    hr_resize_x: int | None = Field(None, ge=0, description="must enlarge both sides alike")
    hr_resize_y: int | None = Field(None, ge=0, description="must enlarge both sides alike")
    # fields that are not supported, with their no-op defaults
    firstphase_width: int | None = Field(None, ge=0, le=0)
    firstphase_height: int | None = Field(None, ge=0, le=0)
    hr_checkpoint_name: Literal["", "Use same checkpoint"] | None = None
    hr_sampler_name: Literal["", "Use same sampler"] | None = None
    hr_scheduler: Literal["", "Use same scheduler"] | None = None
    hr_prompt: Literal[""] | None = None
    hr_negative_prompt: Literal[""] | None = None


class _Img2Img(Body):
    """The body of POST /sdapi/v1/img2img, without the fields of sampling keys."""

    init_images: Annotated[list[str], *_only_one()] = Field(
        description="one picture in base64, or a data URI"
    )
    mask: str | None = Field(
        None, description="a picture in base64, or a data URI: what is white is drawn anew"
    )
    resize_mode: int | None = Field(
        None, ge=0, le=2, description="0: stretch, 1: crop, 2: black borders"
    )
    mask_blur_x: int | None = Field(None, ge=0, le=256, description="must equal mask_blur_y")
    mask_blur_y: int | None = Field(None, ge=0, le=256, description="must equal mask_blur_x")
    inpainting_fill: int | None = Field(
        None, ge=0, le=3, description="0: fill, 1: original, 2: latent noise, 3: latent nothing"
    )
    inpaint_full_res: Switch = Field(None, description="draw only the masked part, at full size")
    inpaint_full_res_padding: int | None = Field(None, ge=0, le=256, description="pixels")
    inpainting_mask_invert: Switch = Field(None, description="draw what is black instead")
    include_init_images: bool | None = Field(False, description="in the response's parameters")
    # fields that are not supported, with their no-op defaults
    initial_noise_multiplier: float | None = Field(None, ge=1, le=1)
    latent_mask: Literal[""] | None = None
    mask_round: OnlyTrue | None = None


def _with_sampling_fields(name: str, base: type[Body], keys: tuple[str, ...]) -> type[Body]:
    """Return `base` with the fields of sampling keys: as in the job, null means the job's value."""
    fields: dict[str, Any] = {}
    for key in keys:
        field = Sampling.model_fields[key]
        kind = field.rebuild_annotation() | None
        fields[PARAMETERS[key]] = (kind, Field(None, description=field.description))
    doc = f"The body of POST /sdapi/v1/{name.lower()}."
    return create_model(name, __base__=base, __doc__=doc, **fields)


Txt2Img = cast(type[_Txt2Img], _with_sampling_fields("Txt2Img", _Txt2Img, SHARED_KEYS))
Img2Img = cast(
    type[_Img2Img], _with_sampling_fields("Img2Img", _Img2Img, (*SHARED_KEYS, *IMG2IMG_KEYS))
)


def from_txt2img(body: _Txt2Img, model: ServedModel, limits: Limits) -> ImageRequest:
    """Return the images that `body` requests; raises as requests.from_generation does."""
    sampling = model.job.sampling
    values = {**_shared_values(body, sampling), **_hires_values(body, sampling)}
    return _image_request(body, values, model, limits)


def from_img2img(body: _Img2Img, model: ServedModel, limits: Limits) -> ImageRequest:
    """Return the images that `body` requests, without their pictures; raises as from_txt2img."""
    sampling = model.job.sampling
    values = {
        **_shared_values(body, sampling),
        **_values(body, IMG2IMG_KEYS),
        **_picture_values(body),
    }
    return _image_request(body, values, model, limits)


def pictures_of(body: _Img2Img) -> Pictures:
    """Return the pictures that `body` holds; raises an ApiError if they are not in base64."""
    invert = bool(body.inpainting_mask_invert)
    return Pictures(
        pictures.from_base64(body.init_images[0], "init_images"),
        pictures.from_base64(body.mask, "mask") if body.mask else None,
        lambda mask: pictures.light_parts(mask, invert),
        image_param="init_images",
    )


def _image_request(
    body: Body, values: dict[str, Any], model: ServedModel, limits: Limits
) -> ImageRequest:
    settings = body.override_settings
    checkpoint = settings.sd_model_checkpoint
    if checkpoint is not None and checkpoint != model.name:
        raise model_not_found("override_settings.sd_model_checkpoint", checkpoint, model.name)
    images = body.batch_size * body.n_iter
    try:
        first = Request.model_validate(values)
    except ValidationError as error:
        raise invalid_body(error) from error
    first = requests.with_lora_weights(first, model.job)
    requests.check_limits(first, images, limits)
    template = DrawRequest(first, model.encoding_for(FILE_FORMATS[settings.samples_format]))
    # as AUTOMATIC1111 counts: variations of an image share its seed
    counted = "variation_seed" if first.variation_strength else "seed"
    return ImageRequest(requests.repeat(template, images, counted))


def _shared_values(body: Body, sampling: Sampling) -> dict[str, Any]:
    """Return the values that both bodies give; those that they leave out are the job's."""
    settings = body.override_settings
    values = sampling.model_dump()
    if settings.eta_ddim:
        values["eta"] = settings.eta_ddim
    values |= _values(body, SHARED_KEYS)
    if values["variation_strength"]:
        values["variation_seed"] = _seed(body.subseed)
    return {
        **values,
        "prompt": body.prompt,
        "negative_prompt": body.negative_prompt or "",
        "sampler": _sampler(body, sampling.sampler),
        "seed": _seed(body.seed),
        "clip_skip": settings.CLIP_stop_at_last_layers - 1,
        "prompt_weights": True,
        "chunk_prompts": True,
    }


def _values(body: Body, keys: tuple[str, ...]) -> dict[str, Any]:
    """Return the values of sampling keys that `body` has."""
    values = {key: getattr(body, PARAMETERS[key]) for key in keys}
    return {key: value for key, value in values.items() if value is not None}


def _seed(value: int) -> int:
    return secrets.randbelow(RANDOM_SEEDS) if value == -1 else value


def _hires_values(body: _Txt2Img, sampling: Sampling) -> dict[str, Any]:
    """Return the values of hires fix; without it, its fields have no effect."""
    in_job = sampling.hires_scale > 1
    if not (in_job if body.enable_hr is None else body.enable_hr):
        return {"hires_scale": 1.0}
    given: dict[str, Any] = {
        "hires_scale": body.hr_scale,
        "hires_steps": body.hr_second_pass_steps,
        "hires_strength": body.denoising_strength,
    }
    values = {key: value for key, value in given.items() if value is not None}
    if body.hr_upscaler:
        values["hires_upscaler"] = _upscaler(body.hr_upscaler)
    if body.hr_resize_x or body.hr_resize_y:
        values["hires_scale"] = _resize_scale(body, sampling)
    elif not in_job:
        values.setdefault("hires_scale", DEFAULT_HIRES_SCALE)
    return values


def _resize_scale(body: _Txt2Img, sampling: Sampling) -> float:
    """Return the scale that gives the size which `body` names."""
    values = {**sampling.model_dump(), **_values(body, ("height", "width"))}
    sides = [(body.hr_resize_x, values["width"]), (body.hr_resize_y, values["height"])]
    [(larger, smaller), *_] = [(after, before) for after, before in sides if after]
    scale: float = larger / smaller
    for after, before in sides:
        if after and int(before * scale) // SIDE_MULTIPLE * SIDE_MULTIPLE != after:
            raise invalid_value(
                "hr_resize_x",
                f"{body.hr_resize_x}, hr_resize_y = {body.hr_resize_y}: must enlarge "
                f"{values['width']}x{values['height']} alike in both directions, to multiples of "
                f"{SIDE_MULTIPLE}",
            )
    return scale


def _upscaler(title: str) -> str:
    """Return our name of an upscaler."""
    names = {title.lower(): name for name, title in UPSCALERS.items()}
    if title.lower() not in names:
        raise invalid_value(
            "hr_upscaler", f"{title!r}: must be one of {', '.join(UPSCALERS.values())}"
        )
    return names[title.lower()]


def _picture_values(body: _Img2Img) -> dict[str, Any]:
    """Return the values of how pictures are read; AUTOMATIC1111 has no hires fix for them."""
    values: dict[str, Any] = {"compat": "a1111", "hires_scale": 1.0}
    if body.resize_mode is not None:
        values["fit"] = FITS[body.resize_mode]
    if body.inpainting_fill is not None:
        values["mask_fill"] = MASK_FILLS[body.inpainting_fill]
    if body.inpaint_full_res is not None:
        values["only_masked"] = bool(body.inpaint_full_res)
    if body.inpaint_full_res_padding is not None:
        values["only_masked_padding"] = body.inpaint_full_res_padding
    blurs = (body.mask_blur_x, body.mask_blur_y)
    if getattr(body, PARAMETERS["mask_blur"]) is None and blurs != (
        None,
        None,
    ):  # it wins over both
        x, y = (DEFAULT_MASK_BLUR if blur is None else blur for blur in blurs)
        if x != y:
            raise invalid_value("mask_blur_x", f"{x}: must equal mask_blur_y, {y}")
        values["mask_blur"] = x
    return values


def _sampler(body: Body, default: str) -> str:
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

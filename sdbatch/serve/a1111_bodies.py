"""The bodies of AUTOMATIC1111's API: every field of it, with the values that are accepted.

A field that would change the picture and is not supported is rejected unless it holds a value that
changes nothing. What a request leaves out has the job's value, not AUTOMATIC1111's default. The
fields of hires fix and of masks are checked in `a1111_requests`, if they have an effect.

Source: the fields of AUTOMATIC1111's modules/api/models.py and modules/processing.py, 1.10.
"""

import re
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, cast, get_args

from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    WithJsonSchema,
    create_model,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue

from sdbatch import samplers
from sdbatch.job import Sampling
from sdbatch.sampling import KEYS, MAX_SEED
from sdbatch.serve.requests import FORMATS, MAX_PROMPT_CHARACTERS
from sdbatch.serve.validation import RequestBody, with_alternative

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
NUMBER_TEXT = r"^-?\d{1,19}(\.\d{1,9})?$"  # clients with forms send numbers as text
PARAMETERS = {name: key.a1111_parameter for name, key in KEYS.items() if key.a1111_parameter}
IMG2IMG_KEYS = ("strength", "image_guidance_scale")  # of img2img alone
TXT2IMG_KEYS = ("hires_scale", "hires_upscaler", "hires_steps")  # of txt2img alone
SHARED_KEYS = tuple(
    name
    for name in PARAMETERS
    if name not in (*IMG2IMG_KEYS, *TXT2IMG_KEYS, "mask_blur", "variation_seed")
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


def _check_scripts(scripts: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    active = [name for name, script in scripts.items() if not _is_off(script)]
    if active:
        raise ValueError(
            f"without {', '.join(active)}: there are no scripts here. Leave out what is switched on"
        )
    return scripts


def _is_off(script: dict[str, Any]) -> bool:
    """Tell whether a script has no arguments, or only such that switch it off."""
    arguments = script.get("args") or []
    return isinstance(arguments, list) and all(
        argument.get("enabled") is False if isinstance(argument, dict) else not argument
        for argument in arguments
    )


OnlyTrue = Annotated[bool, *_only(True)]
OnlyFalse = Annotated[bool, *_only(False)]
Switch = bool | Annotated[int, Field(ge=0, le=1)] | None
Scripts = Annotated[dict[str, dict[str, Any]], AfterValidator(_check_scripts)]


class NumbersAsText(RequestBody):
    """A body whose numbers may be text, and whose whole numbers may be written as 20.0."""

    @model_validator(mode="before")
    @classmethod
    def _read_numbers(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        names = _number_fields(cls)
        return {
            name: _read_number(value) if name in names else value for name, value in values.items()
        }

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: Any, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """Return the JSON Schema, in which numbers may be text."""
        schema = super().__get_pydantic_json_schema__(core_schema, handler)
        fields = schema["properties"]
        for name in _number_fields(cls):
            text = {"type": "string", "pattern": NUMBER_TEXT}
            fields[name] = with_alternative(fields[name], text)
        return schema


@cache
def _number_fields(kind: type[RequestBody]) -> frozenset[str]:
    return frozenset(
        name for name, field in kind.model_fields.items() if _is_number(field.annotation)
    )


def _is_number(annotation: Any) -> bool:
    return annotation in (int, float) or any(map(_is_number, get_args(annotation)))


def _read_number(value: Any) -> Any:
    if isinstance(value, str) and re.fullmatch(NUMBER_TEXT, value):
        value = float(value) if "." in value else int(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


class Settings(NumbersAsText):
    """The supported part of override_settings."""

    model_config = ConfigDict(extra="forbid", strict=True)

    CLIP_stop_at_last_layers: int | None = Field(None, ge=1, le=100)
    sd_model_checkpoint: str | None = None
    samples_format: FileFormat = "png"
    eta_ddim: float | None = Field(None, ge=0, le=1)
    # settings that are not supported, with the values that change nothing
    sd_vae: Literal["Automatic"] = "Automatic"
    eta_ancestral: float = Field(1, ge=1, le=1)
    eta_noise_seed_delta: int = Field(0, ge=0, le=0)


class Body(NumbersAsText):
    """What both bodies have, without the fields of sampling keys."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str = Field("", max_length=MAX_PROMPT_CHARACTERS)
    negative_prompt: str = Field("", max_length=MAX_PROMPT_CHARACTERS)
    seed: int = Field(-1, ge=-1, le=MAX_SEED, description="-1: random")
    subseed: int = Field(
        -1, ge=-1, le=MAX_SEED, description="-1: random; no effect without subseed_strength"
    )
    sampler_name: str | None = Field(None, description="a name from GET /sdapi/v1/samplers")
    sampler_index: str | None = Field(
        None, description="the same, as older clients call it; no effect with sampler_name"
    )
    scheduler: str | None = Field(None, description="a label from GET /sdapi/v1/schedulers")
    batch_size: int = Field(1, ge=1, le=100)
    n_iter: int = Field(1, ge=1, le=100)
    override_settings: Settings = Field(default_factory=Settings)
    override_settings_restore_afterwards: bool = True
    clip_skip: int | None = Field(
        None, ge=1, le=100, description="SD.Next's name of CLIP_stop_at_last_layers"
    )
    send_images: OnlyTrue = True
    # fields that are not supported, with the values that change nothing
    styles: list[Literal[""]] = Field([], max_length=100)
    seed_resize_from_h: int = Field(-1, le=0)
    seed_resize_from_w: int = Field(-1, le=0)
    restore_faces: OnlyFalse = False
    tiling: OnlyFalse = False
    s_churn: float = Field(0, ge=0, le=0)
    s_noise: float = Field(1, ge=1, le=1)
    s_tmin: float | None = Field(None, ge=0, description="no effect without s_churn")
    s_tmax: float | None = Field(None, ge=0, description="no effect without s_churn")
    s_min_uncond: float = Field(0, ge=0, le=0)
    refiner_checkpoint: Literal["", "None"] = ""
    refiner_switch_at: float | None = Field(None, description="no effect without a refiner")
    disable_extra_networks: OnlyFalse = False
    script_name: Literal["", "None"] = ""
    script_args: list[Any] = Field([], description="no effect without a script")
    alwayson_scripts: Scripts = Field({}, description="all of them without arguments or off")
    infotext: Literal[""] = ""
    # fields that never change a picture
    save_images: bool = Field(False, description="no effect: images are not stored")
    do_not_save_samples: bool = Field(False, description="no effect: images are not stored")
    do_not_save_grid: bool = Field(False, description="no effect: there is no grid")
    comments: dict[str, Any] = Field({}, description="no effect, as at AUTOMATIC1111")
    force_task_id: str = Field("", description="no effect: tasks have no names")
    url: str = Field("", exclude=True, description="SillyTavern's settings; no effect")
    auth: str = Field("", exclude=True, description="SillyTavern's settings; no effect")


class Txt2ImgFields(Body):
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
    hr_resize_x: int | None = Field(None, description="must enlarge both sides alike")
    hr_resize_y: int | None = Field(None, description="must enlarge both sides alike")
    # fields that hires fix does not support, unless they say what holds without them
    firstphase_width: int | None = Field(None, description="0")
    firstphase_height: int | None = Field(None, description="0")
    hr_checkpoint_name: str | None = Field(None, description="the served model")
    hr_sampler_name: str | None = Field(None, description="as sampler_name")
    hr_scheduler: str | None = Field(None, description="as scheduler")
    hr_prompt: str | None = Field(None, description="as prompt")
    hr_negative_prompt: str | None = Field(None, description="as negative_prompt")
    hr_additional_modules: list[Any] | None = Field(None, description="Forge's; none")
    firstpass_image: Literal[""] = ""


class Img2ImgFields(Body):
    """The body of POST /sdapi/v1/img2img, without the fields of sampling keys."""

    init_images: Annotated[list[str], *_only_one()] = Field(
        description="one picture in base64, or a data URI", examples=[["iVBORw0KGgo="]]
    )
    mask: str | None = Field(
        None,
        description="a picture in base64, or a data URI: what is white is drawn anew; the other "
        "fields of masks have no effect without it",
    )
    resize_mode: int | None = Field(
        None, ge=0, le=2, description="0: stretch, 1: crop, 2: black borders"
    )
    mask_blur: int | None = Field(None, description="pixels")
    mask_blur_x: int | None = Field(None, description="must equal mask_blur_y")
    mask_blur_y: int | None = Field(None, description="must equal mask_blur_x")
    inpainting_fill: int | None = Field(
        None, description="0: fill, 1: original, 2: latent noise, 3: latent nothing"
    )
    inpaint_full_res: Switch = Field(None, description="draw only the masked part, at full size")
    inpaint_full_res_padding: int | None = Field(None, description="pixels")
    inpainting_mask_invert: Switch = Field(None, description="draw what is black instead")
    include_init_images: bool = Field(False, description="in the response's parameters")
    # fields that are not supported, with the values that change nothing
    initial_noise_multiplier: float = Field(1, ge=1, le=1)
    latent_mask: Literal[""] = ""
    mask_round: OnlyTrue = True


def _with_sampling_fields(name: str, base: type[Body], keys: tuple[str, ...]) -> type[Body]:
    """Return `base` with the fields of sampling keys: as in the job, null means the job's value."""
    fields: dict[str, Any] = {}
    for key in keys:
        field = Sampling.model_fields[key]
        kind = field.rebuild_annotation() | None
        fields[PARAMETERS[key]] = (kind, Field(None, description=field.description))
    doc = f"The body of POST /sdapi/v1/{name.lower()}."
    return create_model(name, __base__=base, __doc__=doc, **fields)


Txt2Img = cast(type[Txt2ImgFields], _with_sampling_fields("Txt2Img", Txt2ImgFields, SHARED_KEYS))
Img2Img = cast(
    type[Img2ImgFields],
    _with_sampling_fields("Img2Img", Img2ImgFields, (*SHARED_KEYS, *IMG2IMG_KEYS)),
)

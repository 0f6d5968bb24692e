"""Every sampling key, declared once: type, range, default, description, AUTOMATIC1111's names.

From `Sampling` derive the job's section, the table's columns, their Arrow fields, the engine's
request, the images' metadata, both APIs and the reference in docs/job.md. The order of the keys is
the order of the output's columns.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeAlias

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from sdbatch import prompt_syntax, samplers
from sdbatch.section import Section

MAX_SEED = 2**63 - 1
SIDE_MULTIPLE = 8  # pixels; a model may need a larger one
MOST_STEPS = 999
MOST_ENLARGED = 8192  # pixels of a side after hires fix
MAX_SIGMA = 1000  # above the noise of every timestep: 15 in Stable Diffusion 1.5

# Of latents, by torch's interpolation, then of pictures, by Pillow's filter; AUTOMATIC1111's names.
LATENT_UPSCALERS = {
    "latent": ("bilinear", False),
    "latent_antialiased": ("bilinear", True),
    "latent_bicubic": ("bicubic", False),
    "latent_bicubic_antialiased": ("bicubic", True),
    "latent_nearest": ("nearest", False),
    "latent_nearest_exact": ("nearest-exact", False),
}
PICTURE_UPSCALERS = ("lanczos", "nearest")
UPSCALERS = (*LATENT_UPSCALERS, *PICTURE_UPSCALERS)
if TYPE_CHECKING:
    Upscaler: TypeAlias = str
else:
    Upscaler = Literal[UPSCALERS]


def _write_number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Key:
    """What is known of a sampling key besides its type, range, default and description."""

    a1111_label: str | None = None  # in the text of parameters that an image file carries
    a1111_parameter: str | None = None  # in AUTOMATIC1111's API
    a1111_value: Callable[[Any], object] = _write_number  # how that text writes it
    model_may_reject: bool = False  # whether a legal value may be impossible for the model


def _check_multiple(value: Any) -> Any:
    if type(value) in (int, float) and 0 < value <= 4096 and value % SIDE_MULTIPLE:
        nearest = max(SIDE_MULTIPLE, round(value / SIDE_MULTIPLE) * SIDE_MULTIPLE)
        raise ValueError(f"must be a multiple of {SIDE_MULTIPLE}. Nearest: {nearest}")
    return value


def _find_sampler(value: Any) -> Any:
    """Return our name for a sampler; another tool's becomes ours before the type is checked."""
    found = samplers.find(value)
    if found is None and type(value) in (int, float):
        raise ValueError("must be a sampler's name, or DiffusionDB's number of one, 1 to 8")
    return found or value


def _check_sampler(value: str) -> str:
    if value not in samplers.NAMES:
        known = samplers.NAMES if "_" in value else samplers.SAMPLERS
        close = difflib.get_close_matches(value, known, n=1)
        hint = f"Did you mean {close[0]!r}? " if close else ""
        raise ValueError(
            f"a sampler. {hint}Known: {', '.join(samplers.SAMPLERS)}; some also with _karras, "
            f"_exponential, _beta, _ays or _trailing at the end, a schedule of their steps"
        )
    return value


def _check_loras(value: str) -> str:
    prompt_syntax.parse_loras(value)
    return value


SamplerName = Annotated[
    str,
    AfterValidator(_check_sampler),
    BeforeValidator(_find_sampler),
    Field(json_schema_extra={"enum": list(samplers.NAMES)}),
]
Share = Annotated[float, Field(ge=0, le=1)]
Sigma = Annotated[float, Field(ge=0, le=MAX_SIGMA)]
# The validator last: it runs first, and the JSON Schema has the range only if it is the type's own.
Pixels = Annotated[
    int, Field(ge=8, le=4096, multiple_of=SIDE_MULTIPLE), BeforeValidator(_check_multiple)
]


class Sampling(Section):
    """How an image is drawn. A column of the same name wins, row by row."""

    negative_prompt: Annotated[str, Key(model_may_reject=True)] = Field(
        "", description="what the image must not show; used where it is guided"
    )
    seed: Annotated[int, Key("Seed")] = Field(
        0,
        ge=0,
        le=MAX_SEED,
        description="a row's seed is derived from this and the row's key, "
        "unless the table has a seed column",
    )
    num_inference_steps: Annotated[int, Key("Steps", "steps", model_may_reject=True)] = Field(
        25, ge=1, le=MOST_STEPS, description="as diffusers counts them"
    )
    guidance_scale: Annotated[float, Key("CFG scale", "cfg_scale")] = Field(
        7.5, ge=1, le=1000, description="weight of the prompt; 1 turns guidance off"
    )
    sampler: Annotated[
        SamplerName, Key("Sampler", a1111_value=samplers.title, model_may_reject=True)
    ] = Field("dpmpp_2m", description="how noise becomes an image, step by step")
    height: Annotated[Pixels, Key(a1111_parameter="height")] = Field(512, description="pixels")
    width: Annotated[Pixels, Key(a1111_parameter="width")] = Field(512, description="pixels")
    guidance_rescale: Share = Field(0, description="0.7 keeps v-prediction models from glaring")
    guidance_start: Share = Field(0, description="guide from this part of the steps on")
    guidance_stop: Share = Field(1, description="guide up to this part of the steps")
    guidance_sigma_low: Sigma = Field(0, description="guide where there is more noise than this")
    guidance_sigma_high: Sigma = Field(
        MAX_SIGMA,
        description="guide where there is no more noise than this; sigma is the noise's standard "
        "deviation by the signal's",
    )
    eta: Annotated[Share, Key("Eta", "eta")] = Field(
        0, description="noise that ddim and tcd add at every step"
    )
    clip_skip: Annotated[
        # AUTOMATIC1111 counts the text encoder's layers from its end, the last as 1
        int, Key("Clip skip", a1111_value=lambda layers: layers + 1, model_may_reject=True)
    ] = Field(0, ge=0, le=100, description="last layers of the text encoder to leave out")
    prompt_weights: Annotated[bool, Key(model_may_reject=True)] = Field(
        False,
        description="read AUTOMATIC1111's syntax: (word), (word:1.3), [word], [a:b:0.5], [a|b], "
        "BREAK and \\(",
    )
    chunk_prompts: bool = Field(
        False, description="encode all of a long prompt, 75 tokens at a time; else it is cut"
    )
    loras: Annotated[str, AfterValidator(_check_loras), Key(model_may_reject=True)] = Field(
        "",
        max_length=1000,
        description="LoRAs of `model.loras` by their names: `NAME:WEIGHT, NAME`",
    )
    cache_interval: Annotated[int, Key(model_may_reject=True)] = Field(
        1,
        ge=1,
        le=10,
        description="DeepCache: run the whole network at every Nth call of the row only, and reuse "
        "its deep features in between: faster, other images. 1: always whole. Samplers with two "
        "calls a step count calls; guidance begins and ends at whole calls",
    )

    strength: Annotated[Share, Key("Denoising strength", "denoising_strength")] = Field(
        0.8,
        description="of a row with a picture: the part of the steps that is drawn, the last ones, "
        "from the picture with noise; 1 leaves little of it",
    )
    compat: Literal["diffusers", "a1111"] = Field(
        "diffusers",
        description="of a row with a picture: whose rules hold where the two tools differ, on how "
        "many steps a strength leaves and how a mask is blended",
    )
    sample_posterior: bool = Field(
        False,
        description="encode a picture as a random sample of what the VAE says of it; else its mean",
    )
    fit: Literal["crop", "pad", "stretch"] = Field(
        "crop",
        description="how a picture of another shape gets that of the image: crop keeps its "
        "middle, pad adds black borders, stretch distorts it",
    )
    resample: Literal["lanczos", "bicubic", "bilinear", "box", "nearest"] = Field(
        "lanczos", description="Pillow's filter that resizes pictures"
    )
    mask_from_alpha: bool = Field(
        False,
        description="draw anew where the picture is transparent, in a row without a mask_image",
    )
    mask_blur: Annotated[int, Key("Mask blur", "mask_blur")] = Field(
        0,
        ge=0,
        le=256,
        description="softens the edge of the mask: the standard deviation of the blur, in pixels",
    )
    mask_fill: Literal["original", "fill", "noise", "nothing"] = Field(
        "original",
        description="what is under the mask before the first step: the picture (original), the "
        "colours around the mask (fill), noise, or latents of zero (nothing)",
    )
    only_masked: Annotated[bool, Key("Inpaint only masked")] = Field(
        False,
        description="cut out the mask's surroundings, draw them at height and width and put them "
        "back; the result has the size of the picture",
    )
    only_masked_padding: Annotated[int, Key("Masked area padding")] = Field(
        32, ge=0, le=256, description="pixels of the picture around the mask that are cut out too"
    )
    image_guidance_scale: Annotated[
        float, Key("Image CFG scale", "image_cfg_scale", model_may_reject=True)
    ] = Field(
        1.5,
        ge=1,
        le=100,
        description="weight of the picture in models that edit by instruction (InstructPix2Pix)",
    )
    variation_seed: Annotated[int, Key("Variation seed", "subseed")] = Field(
        0, ge=0, le=MAX_SEED, description="seed of the noise that variation_strength mixes in"
    )
    variation_strength: Annotated[Share, Key("Variation seed strength", "subseed_strength")] = (
        Field(0, description="how far the noise goes from the seed's (0) to variation_seed's (1)")
    )
    prompt_b: Annotated[str, Key(model_may_reject=True)] = Field(
        "", description="the prompt that `mix` leads to; empty: the row's prompt"
    )
    seed_b: int = Field(
        -1, ge=-1, le=MAX_SEED, description="the seed that `mix` leads to; -1: the row's seed"
    )
    mix: Share = Field(
        0, description="how far the image goes from prompt and seed (0) to prompt_b and seed_b (1)"
    )
    hires_scale: Annotated[float, Key("Hires upscale", "hr_scale")] = Field(
        1,
        ge=1,
        le=8,
        description="hires fix: draw at height and width, then enlarge by this and draw again; no "
        "side of more than 8192 pixels",
    )
    hires_upscaler: Annotated[Upscaler, Key("Hires upscaler", "hr_upscaler")] = Field(
        "latent",
        description="how it is enlarged: `latent...` the latents, lanczos and nearest the picture",
    )
    hires_steps: Annotated[int, Key("Hires steps", "hr_second_pass_steps")] = Field(
        0,
        ge=0,
        le=MOST_STEPS,
        description="steps that the second pass draws; 0: as many as num_inference_steps",
    )
    hires_strength: Annotated[float, Key("Hires denoising strength")] = Field(
        0.7, gt=0, le=1, description="how much of the enlarged picture is drawn anew"
    )

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.eta and not samplers.split(self.sampler)[0].takes_eta:
            raise ValueError(f"eta = {self.eta:g}: must be 0, {self.sampler} has no eta")
        if self.guidance_start > self.guidance_stop:
            raise ValueError(
                f"guidance_start = {self.guidance_start:g}: must not be after guidance_stop, "
                f"{self.guidance_stop:g}"
            )
        if self.guidance_sigma_low > self.guidance_sigma_high:
            raise ValueError(
                f"guidance_sigma_low = {self.guidance_sigma_low:g}: must not be above "
                f"guidance_sigma_high, {self.guidance_sigma_high:g}"
            )
        longest = max(self.height, self.width)
        if longest * self.hires_scale > MOST_ENLARGED:
            raise ValueError(
                f"hires_scale = {self.hires_scale:g}: must leave sides of at most {MOST_ENLARGED} "
                f"pixels, so be at most {MOST_ENLARGED / longest:g} with a side of {longest}"
            )
        return self


def _key_of(name: str) -> Key:
    metadata = Sampling.model_fields[name].metadata
    return next((each for each in metadata if isinstance(each, Key)), Key())


# The keys that say how a row's picture is fitted, and how it is drawn from.
PICTURE_KEYS = frozenset(
    {
        "strength",
        "compat",
        "sample_posterior",
        "fit",
        "resample",
        "mask_from_alpha",
        "mask_blur",
        "mask_fill",
        "only_masked",
        "only_masked_padding",
    }
)
KEYS: dict[str, Key] = {name: _key_of(name) for name in Sampling.model_fields}


def check_seed(seed: int, images: int) -> None:
    """Raise a ValueError if `images` seeds that count up from `seed` leave the range."""
    if seed > MAX_SEED + 1 - images:
        raise ValueError(f"seed = {seed}: must leave room for {images} images below 2**63")

"""The body of a request over HTTP, validated and resolved into the images to draw.

The job gives the values that a request leaves out.
"""

import re
import secrets
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, TypeVar, cast

import yaml
from pydantic import AfterValidator, Field, ValidationError, WithJsonSchema, create_model

from sdbatch.engine.request import Request
from sdbatch.inputs.prepare import Prepared
from sdbatch.job import Job, Limits, Sampling
from sdbatch.output.image_file import Encoding
from sdbatch.prompt_syntax import write_loras
from sdbatch.registry import IMAGE_FORMATS
from sdbatch.sampling import MAX_SEED, check_seed
from sdbatch.serve.drawer import DrawRequest
from sdbatch.serve.errors import (
    Faults,
    body_faults,
    invalid_request,
    invalid_value,
    model_not_found,
)
from sdbatch.serve.validation import RequestBody, check

MAX_PROMPT_CHARACTERS = 4000
RANDOM_SEEDS = 2**32  # a random seed is below: torch's generator keeps no more bits
SIZE_PATTERN = r"^(auto|[1-9][0-9]{0,3}x[1-9][0-9]{0,3})$"
FORMATS = {each.api_name: name for name, each in IMAGE_FORMATS.items()}  # the API's name -> ours
if TYPE_CHECKING:
    ApiFormat: TypeAlias = str
else:
    ApiFormat = Literal[tuple(FORMATS)]


def _only(*values: str, reason: str) -> tuple[AfterValidator, WithJsonSchema]:
    """Require a parameter to have one of `values`, as others cannot be honoured."""

    def check(given: str) -> str:
        if given not in values:
            raise ValueError(f"must be {' or '.join(values)}, as {reason}")
        return given

    return AfterValidator(check), WithJsonSchema({"type": "string", "enum": list(values)})


def _size() -> tuple[AfterValidator, WithJsonSchema]:
    def check(given: str) -> str:
        if not re.fullmatch(SIZE_PATTERN, given):
            raise ValueError("must be auto, or WIDTHxHEIGHT such as 512x768")
        return given

    return AfterValidator(check), WithJsonSchema({"type": "string", "pattern": SIZE_PATTERN})


_QUALITY = "images have one quality here. Leave it out, or set num_inference_steps"
_STYLE = "there are no styles here. Leave it out, or describe the style in the prompt"
_BACKGROUND = "images have no transparent parts"
_MODERATION = "the service has one policy for all requests. Leave it out"
_FIDELITY = "strength says how much of the picture stays. Leave it out, or set strength"


class Generation(Sampling, RequestBody):
    """The body of POST /v1/images/generations. Unknown parameters are rejected."""

    prompt: str = Field(max_length=MAX_PROMPT_CHARACTERS, examples=["a red circle"])
    negative_prompt: str = Field("", max_length=MAX_PROMPT_CHARACTERS)
    prompt_b: str = Field("", max_length=MAX_PROMPT_CHARACTERS)
    model: str | None = Field(None, description="a name that GET /v1/models lists")
    n: int = Field(1, ge=1, le=100, description="images; their seeds count up from the first")
    size: Annotated[str, *_size()] = Field(
        "auto", description="WIDTHxHEIGHT; auto: height and width"
    )
    response_format: Literal["b64_json", "url"] | None = Field(
        None, description="default: b64_json; url for a model named dall-e-..., as at OpenAI"
    )
    output_format: ApiFormat = "png"
    output_compression: int | None = Field(
        None, ge=0, le=100, description="quality of a format that is not lossless"
    )
    user: str | None = Field(None, max_length=256, description="goes into the log")
    safety_identifier: str | None = Field(
        None, max_length=256, description="the same by its newer name, which wins"
    )
    exact: bool = Field(
        False, description="bit for bit what a batch run draws, even if that takes longer"
    )
    # parameters of OpenAI's models, with the values that change nothing here
    quality: Annotated[str, *_only("auto", "standard", "medium", reason=_QUALITY)] = Field(
        "auto", description="no effect: images have one quality"
    )
    style: Annotated[str, *_only("vivid", reason=_STYLE)] = Field(
        "vivid", description="no effect: there are no styles"
    )
    background: Annotated[str, *_only("auto", "opaque", reason=_BACKGROUND)] = Field(
        "auto", description="no effect: images are opaque"
    )
    moderation: Annotated[str, *_only("auto", reason=_MODERATION)] = Field(
        "auto", description="no effect: the service has one policy"
    )
    input_fidelity: Annotated[str, *_only("low", reason=_FIDELITY)] = Field(
        "low", description="no effect: `strength` has"
    )


class Streamable(Generation):
    """A generation whose previews can be sent as server-sent events."""

    stream: bool = False
    partial_images: int = Field(0, ge=0, le=3, description="previews of a streamed image")


class Variation(Generation):
    """The fields of POST /v1/images/variations: without a prompt the picture alone counts."""

    prompt: str = Field("", max_length=MAX_PROMPT_CHARACTERS)


Body = TypeVar("Body", bound=Sampling)


@dataclass(frozen=True)
class ImageRequest:
    """The images of one request over HTTP."""

    draw_requests: tuple[DrawRequest, ...]  # alike but for seed and sample index
    by_url: bool = False
    stream: bool = False
    user: str | None = None
    pictures_size: int = 0  # bytes that its pictures take in memory

    @property
    def first(self) -> Request:
        """Return the engine's request of the first image."""
        return self.draw_requests[0].request

    @property
    def image_format(self) -> str:
        """Return the format of all its images, one of registry.IMAGE_FORMATS."""
        return self.draw_requests[0].encoding.image_format

    def with_pictures(self, prepared: Prepared) -> "ImageRequest":
        """Return the request of images that are drawn from pictures."""
        arrays = prepared.arrays
        draw_requests = tuple(
            replace(
                each, request=each.request.model_copy(update={"inputs": arrays}), prepared=prepared
            )
            for each in self.draw_requests
        )
        size = sum(array.nbytes for array in arrays.values())
        size += sum(len(file) for file in prepared.files.values())
        return replace(self, draw_requests=draw_requests, pictures_size=size)

    def without_pictures(self) -> "ImageRequest":
        """Return the request without its pictures, as it is stored once it is drawn."""
        if not self.pictures_size:
            return self
        draw_requests = tuple(
            replace(each, request=each.request.model_copy(update={"inputs": {}}), prepared=None)
            for each in self.draw_requests
        )
        return replace(self, draw_requests=draw_requests, pictures_size=0)


@dataclass(frozen=True)
class ServedModel:
    """The model that is served, and the values that a request leaves out."""

    job: Job  # resolved: its engine settings are those of exact images
    name: str  # in the API
    encoding: Encoding  # the job's; names the model in the images' metadata

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names that clients may ask for, its own first."""
        return (self.name, *self.job.serve.aliases)

    def check_name(self, key: str, name: str | None) -> None:
        """Raise an ApiError if a request names another model.

        Args:
            key: the parameter.
            name: the model that it names; None or empty: whichever is served.
        """
        if name and name not in self.names:
            raise model_not_found(key, name, self.names)

    def encoding_for(self, image_format: str, quality: int | None = None) -> Encoding:
        """Return how images of a format are encoded; `quality` None: as the job, or its default."""
        default = IMAGE_FORMATS[image_format].quality
        if default is None:
            return replace(self.encoding, image_format=image_format, quality=None)
        if quality is None:
            quality = default if self.encoding.quality is None else self.encoding.quality
        return replace(self.encoding, image_format=image_format, quality=max(1, quality))


def body_with_defaults(kind: type[Body], job: Job) -> type[Body]:
    """Return the body `kind` with the job's sampling as its defaults."""
    fields: dict[str, Any] = {}
    for name in Sampling.model_fields:
        field = copy(kind.model_fields[name])
        field.default = getattr(job.sampling, name)
        fields[name] = (field.annotation, field)
    seed = Field(None, ge=0, le=MAX_SEED, description="default: random; the response has it")
    fields["seed"] = (int | None, seed)
    return cast(type[Body], create_model(kind.__name__, __base__=kind, **fields))


def from_generation(body: Generation, model: ServedModel, limits: Limits) -> ImageRequest:
    """Return the images that `body` requests.

    Raises:
        ApiError: 400 if they cannot be drawn or exceed the limits, 404 for another model.
    """
    faults = Faults()
    with faults.collect():
        model.check_name("model", body.model)
    values = _sampling_values(body, faults)
    encoding = _encoding(body, model, faults)
    stream, previews = _stream_options(body, faults)

    def images_of(first: Request) -> tuple[DrawRequest, ...]:
        return repeat(DrawRequest(first, encoding, exact=body.exact, previews=previews), body.n)

    draw_requests = all_images(values, body.n, model.job, limits, faults, images_of)
    user = body.safety_identifier or body.user
    return ImageRequest(draw_requests, _is_by_url(body), stream, user)


def all_images(
    values: Mapping[str, Any],
    images: int,
    job: Job,
    limits: Limits,
    faults: Faults,
    images_of: Callable[[Request], tuple[DrawRequest, ...]],
) -> tuple[DrawRequest, ...]:
    """Return the images of a request, checked.

    Args:
        values: of the first image.
        images: their number.
        job: the served one.
        limits: of the key.
        faults: those that were found before.
        images_of: makes all images of the first one.

    Raises:
        ApiError: names all faults.
    """

    def build(first: Request) -> tuple[DrawRequest, ...]:
        later = Faults()
        with later.collect():
            check_limits(first, images, limits)
        if images <= limits.images:
            with later.collect():
                draw_requests = images_of(with_lora_weights(first, job))
        later.raise_any()
        return draw_requests

    return check(Request, values, build, faults)[1]


def with_lora_weights(request: Request, job: Job) -> Request:
    """Return the request with the weights of LoRAs that it leaves to the job."""
    return request.updated(loras=write_loras(request.loras, job.model.row_loras))


def repeat(template: DrawRequest, images: int, counted: str = "seed") -> tuple[DrawRequest, ...]:
    """Return `images` requests whose seeds count up, as those of a row's images do.

    Args:
        template: the first request.
        images: their number.
        counted: the sampling key that counts up.

    Raises:
        ApiError: 400 if a seed would leave the range.
    """
    seed = getattr(template.request, counted)
    try:
        check_seed(seed, images)
    except ValueError as error:
        raise invalid_request(error) from error
    return tuple(
        replace(template, request=template.request.updated(**{counted: seed + i}), sample_index=i)
        for i in range(images)
    )


def check_limits(request: Request, images: int, limits: Limits) -> None:
    """Raise an ApiError if `images` images exceed `limits`; hires fix counts at its second size."""
    faults = Faults()
    second = request.enlarged()
    largest = second or request
    if largest.height * largest.width > limits.pixels:
        size = f"{largest.width}x{largest.height}{' after hires fix' if second else ''}"
        faults.add(invalid_value("size", f"{size}: must have {limits.pixels} pixels at most"))
    steps = {"num_inference_steps": request.num_inference_steps}
    if second is not None:
        steps["hires_steps"] = second.num_inference_steps
    for name, value, most in (
        ("n", images, limits.images),
        *((name, value, limits.num_inference_steps) for name, value in steps.items()),
    ):
        if value > most:
            faults.add(invalid_value(name, f"{value}: must be {most} at most"))
    faults.raise_any()


def job_file(image_request: ImageRequest, job: Job) -> str:
    """Return a job file in YAML whose batch run draws the images of a request."""
    first, encoding = image_request.first, image_request.draw_requests[0].encoding
    images = len(image_request.draw_requests)
    settings = job.model_dump(mode="json", exclude_defaults=True)
    sampling = {name: getattr(first, name) for name in Sampling.model_fields if name != "seed"}
    output: dict[str, Any] = {"path": "out/again", "image_format": encoding.image_format}
    if encoding.quality is not None:
        output["quality"] = encoding.quality
    elif encoding.compression is not None:
        output["compression"] = encoding.compression
    prompts: dict[str, Any] = {"rows": [{"prompt": first.prompt, "seed": first.seed}]}
    if images > 1:
        prompts["images_per_row"] = images
    model = {name: value for name, value in settings["model"].items() if name != "sha256"}
    values = {
        "prompts": prompts,
        "model": model["path"] if list(model) == ["path"] else model,
        "sampling": sampling,
        "engine": job.engine.model_dump(),
        **({"safety": settings["safety"]} if "safety" in settings else {}),
        "output": output,
    }
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)


def _sampling_values(body: Generation, faults: Faults) -> dict[str, Any]:
    """Return the sampling values of the first image, and its prompt."""
    values = {name: getattr(body, name) for name in Sampling.model_fields}
    if values["seed"] is None:
        values["seed"] = secrets.randbelow(RANDOM_SEEDS)
    if body.size != "auto":
        with faults.collect():
            values |= _sides(body)
    return {**values, "prompt": body.prompt}


def _sides(body: Generation) -> dict[str, int]:
    """Return the height and the width that `size` gives."""
    sides = {"height", "width"} & body.model_fields_set
    if sides:
        raise invalid_value(
            "size", f"{body.size!r}: must not be given together with {min(sides)}. Give one"
        )
    width, height = (int(side) for side in body.size.split("x"))
    try:
        Sampling(height=height, width=width)
    except ValidationError as error:
        text = " ".join(map(str, body_faults(error)))
        raise invalid_value("size", f"{body.size!r}: {text}") from error
    return {"height": height, "width": width}


def _encoding(body: Generation, model: ServedModel, faults: Faults) -> Encoding:
    """Return how the images are encoded; of a lossless format, 100 is all there is."""
    image_format, compression = FORMATS[body.output_format], body.output_compression
    if IMAGE_FORMATS[image_format].quality is not None:
        return model.encoding_for(image_format, compression)
    if compression not in (None, 100):
        text = f"{compression}: {body.output_format} is lossless. Leave it out, or choose another"
        faults.add(invalid_value("output_compression", f"{text} output_format"))
    return model.encoding_for(image_format)


def _is_by_url(body: Generation) -> bool:
    """Tell whether the images are fetched by URL, as OpenAI's DALL-E models sent them."""
    if body.response_format is None:
        return (body.model or "").startswith("dall-e-")
    return body.response_format == "url"


def _stream_options(body: Generation, faults: Faults) -> tuple[bool, int]:
    """Return whether the image is streamed, and the number of its previews."""
    if not isinstance(body, Streamable):
        return False, 0
    if not body.stream:
        if body.partial_images:
            text = f"{body.partial_images}: must be 0 without stream"
            faults.add(invalid_value("partial_images", text))
        return False, 0
    if body.n > 1:
        faults.add(invalid_value("n", f"{body.n}: must be 1 in a streamed request"))
    if body.response_format == "url":
        text = "'url': must be b64_json in a streamed request"
        faults.add(invalid_value("response_format", text))
    return True, body.partial_images

"""What a request over HTTP asks for, resolved: the job's values where it says nothing."""

import secrets
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar, cast

import yaml
from pydantic import Field, ValidationError, create_model

from sdbatch.engine.request import Request
from sdbatch.job import MAX_SEED, Job, Limits, Sampling, explain
from sdbatch.output.image_file import Encoding
from sdbatch.serve.drawer import Asked
from sdbatch.serve.errors import Refusal

LONGEST = 4000  # characters of a prompt
SEEDS = 2**32  # a seed that nobody gave is below: torch's generator keeps no more bits
SIZE = r"^[1-9]\d{0,3}x[1-9]\d{0,3}$"


class Generation(Sampling):
    """The body of POST /v1/images/generations. Unknown parameters are refused."""

    prompt: str = Field(max_length=LONGEST)
    negative_prompt: str = Field("", max_length=LONGEST)
    model: str | None = Field(None, description="the one that GET /v1/models names")
    n: int = Field(1, ge=1, le=100, description="images; with seeds that count up from the first")
    size: str = Field(
        "auto", pattern=rf"^auto$|{SIZE}", description="WIDTHxHEIGHT; auto: height and width"
    )
    response_format: Literal["b64_json", "url"] = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: int | None = Field(None, ge=0, le=100, description="of jpeg and webp")
    user: str | None = Field(None, max_length=256, description="goes into the log")
    exact: bool = Field(
        False, description="bit for bit what a batch run draws, also where that takes longer"
    )


class Streamable(Generation):
    """A generation whose previews can be sent as server-sent events."""

    stream: bool = False
    partial_images: int = Field(0, ge=0, le=3, description="previews of a streamed image")


Body = TypeVar("Body", bound=Sampling)


@dataclass(frozen=True)
class Wanted:
    """Images that a request asks for."""

    asked: tuple[Asked, ...]  # the same but for seed and sample index
    by_url: bool = False
    previews: int | None = None  # None: not streamed
    user: str | None = None

    @property
    def first(self) -> Request:
        """Return what the first image is drawn from."""
        return self.asked[0].request


@dataclass(frozen=True)
class Offer:
    """What is served."""

    job: Job  # its engine resolved: what an exact image is drawn with
    model: str  # what the API calls it
    encoding: Encoding  # names the model in images' metadata; its quality is the default


def body_of(kind: type[Body], job: Job) -> type[Body]:
    """Return the body `kind` with the job's sampling as its defaults."""
    fields: dict[str, Any] = {}
    for name in Sampling.model_fields:
        field = kind.model_fields[name]
        own = copy(field)
        own.default = getattr(job.sampling, name)
        fields[name] = (field.rebuild_annotation(), own)
    seed = Field(None, ge=0, le=MAX_SEED, description="default: any; the answer says which")
    fields["seed"] = (int | None, seed)
    return cast(type[Body], create_model(kind.__name__, __base__=kind, **fields))


def parse(kind: type[Body], text: bytes) -> Body:
    """Return the body that `text` is; raises a Refusal if it is none."""
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        raise unreadable(error) from error


def read(body: Generation, offer: Offer, limits: Limits) -> Wanted:
    """Return the images that `body` asks for.

    Raises:
        Refusal: 400 where it asks for what cannot be, or is more than the limits allow.
    """
    if body.model not in (None, offer.model):
        text = f"model = {body.model!r}: only {offer.model} is served here."
        raise Refusal(404, text, code="model_not_found", param="model")
    sampling = _sampling(body)
    check(sampling, body.n, limits)
    seed = secrets.randbelow(SEEDS) if body.seed is None else body.seed
    if seed > MAX_SEED + 1 - body.n:
        raise bad("seed", f"{seed}: must leave room for {body.n} images below 2**63")
    if body.output_format == "png" and body.output_compression is not None:
        raise bad("output_compression", f"{body.output_compression}: png is lossless")
    streamed = isinstance(body, Streamable) and body.stream
    if streamed and body.n > 1:
        raise bad("n", f"{body.n}: a streamed request draws one image")
    if streamed and body.response_format == "url":
        raise bad("response_format", "'url': a streamed image comes as b64_json")
    if isinstance(body, Streamable) and body.partial_images and not streamed:
        raise bad("partial_images", f"{body.partial_images}: must be 0 without stream")
    form = {"jpeg": "jpg"}.get(body.output_format, body.output_format)
    own = encoded_as(offer, form, body.output_compression)
    first = Request(prompt=body.prompt, **{**sampling.model_dump(), "seed": seed})
    previews = body.partial_images if isinstance(body, Streamable) and body.stream else None
    return Wanted(
        copies(first, body.n, own, exact=body.exact, previews=previews or 0),
        body.response_format == "url",
        previews,
        body.user,
    )


def copies(
    first: Request, n: int, encoding: Encoding, *, exact: bool = False, previews: int = 0
) -> tuple[Asked, ...]:
    """Return n images of a request, their seeds counting up as those of a row's copies do."""
    return tuple(
        Asked(replace(first, seed=first.seed + i), encoding, i, exact, previews) for i in range(n)
    )


def encoded_as(offer: Offer, form: str, quality: int | None = None) -> Encoding:
    """Return how images of a format are encoded where a quality may be asked for."""
    own = offer.encoding.quality if quality is None else max(1, quality)
    return replace(offer.encoding, image_format=form, quality=own)


def check(sampling: Sampling, images: int, limits: Limits) -> None:
    """Raise a Refusal if so many images ask for more than `limits`."""
    pixels = sampling.height * sampling.width
    if pixels > limits.pixels:
        size = f"{sampling.width}x{sampling.height}"
        raise bad("size", f"{size}: must have {limits.pixels} pixels at most")
    for name, value, most in (
        ("n", images, limits.images),
        ("num_inference_steps", sampling.num_inference_steps, limits.num_inference_steps),
    ):
        if value > most:
            raise bad(name, f"{value}: must be {most} at most")


def bad(param: str, text: str) -> Refusal:
    """Return the refusal of a parameter; `text` says what it is and must be."""
    return Refusal(400, f"{param} = {text}.", code="invalid_value", param=param)


def unreadable(error: ValidationError) -> Refusal:
    """Return the refusal of a body that pydantic found wrong."""
    first = error.errors()[0]
    param = ".".join(str(part) for part in first["loc"] if not str(part).startswith("literal["))
    if first["type"] == "extra_forbidden":
        text = f"{param}: unknown parameter. It would change nothing, so it is refused."
        return Refusal(400, text, code="unknown_parameter", param=param)
    if first["type"] == "value_error" and not param:
        param = str(first["msg"]).removeprefix("Value error, ").partition(" = ")[0]
    code = "missing_required_parameter" if first["type"] == "missing" else "invalid_value"
    return Refusal(400, explain(error), code=code, param=param or None)


def job_file(wanted: Wanted, job: Job) -> str:
    """Return a job file in YAML whose batch run draws the images of `wanted`."""
    asked = wanted.asked[0]
    request, encoding = asked.request, asked.encoding
    known = job.model_dump(mode="json", exclude_defaults=True)
    sampling = {name: getattr(request, name) for name in Sampling.model_fields if name != "seed"}
    output: dict[str, Any] = {"path": "out/again", "image_format": encoding.image_format}
    if encoding.image_format != "png":
        output["quality"] = encoding.quality
    prompts: dict[str, Any] = {"rows": [{"prompt": request.prompt, "seed": request.seed}]}
    if len(wanted.asked) > 1:
        prompts["images_per_row"] = len(wanted.asked)
    model = {name: value for name, value in known["model"].items() if name != "sha256"}
    values = {
        "prompts": prompts,
        "model": model["path"] if list(model) == ["path"] else model,
        "sampling": sampling,
        "engine": job.engine.model_dump(),
        **({"safety": known["safety"]} if "safety" in known else {}),
        "output": output,
    }
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)


def _sampling(body: Generation) -> Sampling:
    values = {name: getattr(body, name) for name in Sampling.model_fields}
    if body.size != "auto":
        given = {"height", "width"} & body.model_fields_set
        if given:
            raise bad("size", f"{body.size!r}: beside {min(given)}. Give one of them")
        values["width"], values["height"] = (int(side) for side in body.size.split("x"))
    values["seed"] = body.seed or 0
    try:
        return Sampling.model_validate(values)
    except ValidationError as error:
        refused = unreadable(error)
        if body.size != "auto" and refused.body["error"]["param"] in ("height", "width"):
            raise bad(
                "size", f"{body.size!r}: both sides must be multiples of 8, to 4096"
            ) from error
        raise refused from error

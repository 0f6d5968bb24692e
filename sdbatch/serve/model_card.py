"""What GET /v1/models says of the model: the limits of the key that asks, and the defaults.

A client, as the page, can show them before it sends a request.
"""

from typing import Any, Literal

from pydantic import BaseModel, Field

from sdbatch import samplers
from sdbatch.job import Limits
from sdbatch.serve.requests import ServedModel

_RANGE_KEYS = {  # JSON Schema's name -> ours
    "minimum": "minimum",
    "maximum": "maximum",
    "multipleOf": "multiple_of",
    "maxLength": "max_length",
}


class Range(BaseModel):
    """The values that a field of a request may have."""

    minimum: int | float | None = None
    maximum: int | float | None = None
    multiple_of: int | None = None
    max_length: int | None = Field(None, description="characters")


class ModelCard(BaseModel):
    """The model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    limits: dict[str, Range] = Field(
        description="of the key that asks, by the names of a request's fields; `pixels`: width "
        "times height; `images_per_minute`, if there is a limit"
    )
    defaults: dict[str, Any] = Field(
        description="the values of the fields that a request leaves out"
    )
    samplers: dict[str, str] = Field(description="their names, and their titles for people")


class ModelCards(BaseModel):
    """All models that are served."""

    object: Literal["list"]
    data: list[ModelCard]


def field_ranges(body: type[BaseModel]) -> dict[str, Range]:
    """Return the ranges of the fields of `body` that have one."""
    ranges = {}
    for name, schema in body.model_json_schema()["properties"].items():
        # a field that may be null has its range in one of several schemas
        merged = {
            key: value for each in schema.get("anyOf", [schema]) for key, value in each.items()
        }
        values = {ours: merged[key] for key, ours in _RANGE_KEYS.items() if key in merged}
        if values:
            ranges[name] = Range(**values)
    return ranges


def model_card(
    name: str, model: ServedModel, ranges: dict[str, Range], limits: Limits, created: int
) -> ModelCard:
    """Return what a key may know of the model.

    Args:
        name: of the model in the API.
        model: the model.
        ranges: of the fields of a request, whoever sends it.
        limits: the key's.
        created: when the service started, in seconds since 1970.
    """
    job = model.job
    images = min(limits.images, limits.images_per_minute or limits.images)
    own = {
        "n": Range(minimum=1, maximum=images),
        "num_inference_steps": Range(minimum=1, maximum=limits.num_inference_steps),
        "pixels": Range(maximum=limits.pixels),
    }
    if limits.images_per_minute is not None:
        own["images_per_minute"] = Range(maximum=limits.images_per_minute)
    return ModelCard(
        id=name,
        object="model",
        created=created,
        owned_by="sdbatch",
        limits={**ranges, **own},
        defaults=job.sampling.model_dump(mode="json", exclude={"seed"}),
        samplers={each: samplers.title(each) for each in samplers.NAMES},
    )

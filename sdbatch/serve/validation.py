"""What the bodies of both APIs share: null means left out, and one answer names all faults."""

from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import BaseModel, GetJsonSchemaHandler, ValidationError, model_validator
from pydantic.json_schema import JsonSchemaValue

from sdbatch.serve.errors import Faults, body_faults, combined

# Fields whose values are checked together. Once one of them is at fault, what a check says of the
# others can be wrong, so it is not said.
_CHECKED_TOGETHER = (
    {"sampler", "sampler_name", "sampler_index", "scheduler", "eta"},
    {"size", "height", "width", "hires_scale", "enable_hr", "hr_scale", "hr_resize_x"}
    | {"hr_resize_y"},
    {"num_inference_steps", "steps", "strength", "denoising_strength"},
    {"hires_steps", "hr_second_pass_steps", "hires_strength", "denoising_strength", "enable_hr"},
    {"guidance_start", "guidance_stop"},
    {"guidance_sigma_low", "guidance_sigma_high"},
    {"stream", "partial_images", "n", "response_format"},
    {"output_format", "output_compression"},
    {"mask_blur_x", "mask_blur_y", "mask_blur"},
)
MOST_FIELDS = 200  # of a body; more than any API has
Kind = TypeVar("Kind", bound=BaseModel)
Value = TypeVar("Value")


class RequestBody(BaseModel):
    """A body in which null means that an optional field is left out."""

    @model_validator(mode="before")
    @classmethod
    def _leave_out_nulls(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        if len(values) > MOST_FIELDS:
            raise ValueError(f"{len(values)} fields: must be {MOST_FIELDS} at most")
        optional = {name for name, field in cls.model_fields.items() if not field.is_required()}
        return {
            name: value
            for name, value in values.items()
            if value is not None or name not in optional
        }

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: Any, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """Return the JSON Schema, in which optional fields may be null."""
        schema = handler.resolve_ref_schema(handler(core_schema))
        for name, field in schema["properties"].items():
            if name not in schema.get("required", ()):
                schema["properties"][name] = with_alternative(field, {"type": "null"})
        return schema


def with_alternative(schema: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON Schema of a value that may have another form too."""
    about: dict[str, Any] = {
        key: schema[key] for key in ("title", "description", "default") if key in schema
    }
    forms = schema.get("anyOf") or [
        {key: value for key, value in schema.items() if key not in about}
    ]
    return {**about, "anyOf": forms if other in forms else [*forms, other]}


def check(
    kind: type[Kind], values: Any, build: Callable[[Kind], Value], faults: Faults
) -> tuple[Kind, Value]:
    """Return `values` as `kind`, and what `build` makes of it.

    Values at fault are taken out, so that the rest is checked too.

    Args:
        kind: a body, or what is made of one.
        values: its fields.
        build: what is done with it; raises an ApiError if it cannot be.
        faults: those that were found before.

    Raises:
        ApiError: names all faults.
    """
    faulty = {name for each in faults.errors if (name := _field(each.param))}
    while True:
        try:
            checked = kind.model_validate(values)
            break
        except ValidationError as error:
            found = body_faults(error)
            faults.add(*(each for each in found if not _is_doubtful(each.param, faulty)))
            names = {_field(each.param) for each in found} & ({*kind.model_fields, *values})
            if names <= faulty:  # what is left cannot be checked without them
                raise combined(faults.errors) from error
            faulty |= names
            values = _without(values, names, kind)
    later = Faults()
    with later.collect():
        built = build(checked)
    faults.add(*(each for each in later.errors if not _is_doubtful(each.param, faulty)))
    faults.raise_any()
    return checked, built


def _field(param: str | None) -> str:
    """Return the field of the body in which a fault is."""
    return (param or "").partition(".")[0]


def _is_doubtful(param: str | None, faulty: set[str]) -> bool:
    """Tell whether a fault may only come from another field's, which was taken out."""
    name = _field(param)
    return name in faulty or any(name in group and group & faulty for group in _CHECKED_TOGETHER)


def _without(values: dict[str, Any], names: set[str], kind: type[BaseModel]) -> dict[str, Any]:
    """Return `values` without some; a required one is replaced by its example."""
    examples = {
        name: (kind.model_fields[name].examples or [None])[0]
        for name in names & {*kind.model_fields}
        if kind.model_fields[name].is_required()
    }
    return {**{name: value for name, value in values.items() if name not in names}, **examples}

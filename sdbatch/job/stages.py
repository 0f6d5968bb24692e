"""The entries of the job's `stages`: drawing again, and the kinds of the registry."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, create_model, model_serializer
from pydantic import model_validator as validator
from pydantic.fields import FieldInfo

from sdbatch.registry import STAGES
from sdbatch.sampling import Sampling
from sdbatch.section import Section


class _Partial(Section):
    """A section without those of its keys that are left out."""

    @model_serializer(mode="wrap")
    def _leave_out(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in write(self).items() if value is not None}


def _again(field: FieldInfo) -> Any:
    """Return a sampling key that may be left out."""
    kept: Any = field.annotation
    if field.metadata:
        kept = Annotated[kept, *field.metadata]
    return (kept | None, Field(None, description=field.description))


_DrawAgain = create_model(
    "DrawAgain",
    __base__=_Partial,
    __doc__="Sampling keys; the row's own where they are left out.",
    **{name: _again(field) for name, field in Sampling.model_fields.items()},
)
_KINDS = {
    name: (Literal[kind.choices] | None, Field(None, description=kind.description))
    for name, kind in STAGES.items()
}


class _Stage(_Partial):
    """What is done with the images of a shard after they were drawn: one of its keys."""

    draw: _DrawAgain | None = Field(
        None, description="draw each image again from itself, with these sampling keys"
    )

    @validator(mode="after")
    def _check_one(self) -> "_Stage":
        set_keys = self.model_dump()
        if len(set_keys) != 1 or not all(set_keys.values()):
            known = ", ".join(type(self).model_fields)
            raise ValueError(
                f"one of {known} with its value: {{score: shapes}}, {{draw: {{strength: 0.4}}}}"
            )
        return self

    def __str__(self) -> str:
        return str(self.model_dump())


if TYPE_CHECKING:
    Stage = _Stage
else:
    Stage = create_model("Stage", __base__=_Stage, __doc__=_Stage.__doc__, **_KINDS)

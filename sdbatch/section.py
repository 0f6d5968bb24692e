"""What all sections of the job file share, the sampling keys included."""

from typing import Any, Self

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of the job file: no unknown key, no guessed type, no change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    def updated(self, **values: Any) -> Self:
        """Return this section with other values for some keys, validated like any section."""
        own = {name: getattr(self, name) for name in type(self).model_fields}
        return type(self).model_validate({**own, **values})

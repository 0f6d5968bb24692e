"""What all sections of the job file share, the sampling keys included."""

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, PlainSerializer

from sdbatch.urls import without_secrets

# A path or URL of the job file, which is written to other files without its secrets.
Address = Annotated[str, PlainSerializer(without_secrets, return_type=str, when_used="json")]


class Section(BaseModel):
    """A part of the job file: no unknown key, no guessed type, no change after loading."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,  # a URL among it may hold secrets
    )

    def updated(self, **values: Any) -> Self:
        """Return this section with other values for some keys, validated like any section."""
        own = {name: getattr(self, name) for name in type(self).model_fields}
        return type(self).model_validate({**own, **values})

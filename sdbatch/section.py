"""What all sections of the job file share."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of the job file: no unknown key, no guessed type, no change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

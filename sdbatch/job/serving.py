"""The section of the job file that says how single requests are answered."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from sdbatch.section import Section


class Limits(Section):
    """What a request to the service may ask for at most. A key may have its own."""

    images: int = Field(10, ge=1, le=100, description="a request")
    images_per_minute: int | None = Field(None, ge=1, description="a key; default: any number")
    pixels: int = Field(1024 * 1024, ge=64, description="an image: its height times its width")
    num_inference_steps: int = Field(150, ge=1, le=999)


class Serve(Section):
    """How `sdbatch serve` answers single requests. Changes no byte of the output."""

    min_replicas: int = Field(1, ge=1, description="engines that are always there")
    max_replicas: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto", description="engines under load; auto: as many as the cluster holds"
    )
    queue: int = Field(
        256, ge=1, description="images taken in and not yet drawn; more are refused with 503"
    )
    timeout_s: float = Field(300, gt=0, description="a request that takes longer is given up")
    keep_s: float = Field(3600, gt=0, description="how long images can be fetched by their URLs")
    keep_mib: int = Field(
        1024, ge=1, description="of images kept, and as much of long jobs; the oldest go first"
    )
    keys: str | None = Field(
        None,
        description="a file of API keys in YAML, name: key; also SDBATCH_API_KEYS. Without "
        "any, only this machine is answered",
    )
    limits: Limits = Limits()
    log_prompts: bool = False

    @model_validator(mode="after")
    def _keeps_what_it_draws(self) -> "Serve":
        if self.keep_s < self.timeout_s:
            raise ValueError(
                f"keep_s = {self.keep_s:g}: must be timeout_s, {self.timeout_s:g}, at least"
            )
        return self

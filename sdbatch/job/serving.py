"""The section `serve` of the job file: how the service answers single requests."""

import os
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, model_validator

from sdbatch.section import Address, Section
from sdbatch.urls import FOLDER, names_folder


def _find_folder(path: str) -> str:
    """Return a URL, or a local path as an absolute one: the process that writes has its own."""
    if not names_folder(path):
        raise ValueError(f"must be {FOLDER}")
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))


def _check_public_url(url: str) -> str:
    """Return a URL without the slash at its end; raise a ValueError if clients cannot use it."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError(f"{url!r}: must be a URL such as https://images.example.org/path")
    return url.rstrip("/")


def _check_origin(origin: str) -> str:
    """Return an origin; raise a ValueError if it is not as browsers send it."""
    parts = urlsplit(origin)
    exact = f"{parts.scheme}://{parts.netloc}".lower()
    is_one = parts.scheme in ("http", "https") and parts.hostname and "@" not in parts.netloc
    if not is_one or "*" in origin or origin != exact:
        raise ValueError(
            f"{origin!r}: must be one origin, such as https://app.example.org, without a path and "
            f"in lower case; `*` would let any page use the service"
        )
    return origin


class Limits(Section):
    """The largest request that the service accepts. An API key may have limits of its own."""

    images: int = Field(10, ge=1, le=100, description="in one request")
    images_per_minute: int | None = Field(
        None, ge=1, description="for one API key; default: any number"
    )
    pixels: int = Field(1024 * 1024, ge=64, description="of one image: its height times its width")
    num_inference_steps: int = Field(150, ge=1, le=999)


class Serve(Section):
    """How `sdbatch serve` answers single requests. Changes no byte of the output."""

    aliases: list[Annotated[str, Field(min_length=1)]] = Field(
        [],
        description="names by which clients may ask for the model too: gpt-image-1, dall-e-3, ...",
    )
    min_replicas: int = Field(1, ge=1, description="engines that always run")
    max_replicas: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto", description="engines under load; auto: as many as the cluster holds"
    )
    queue: int = Field(
        256, ge=1, description="images accepted and not yet drawn; more are rejected with 503"
    )
    timeout_s: float = Field(300, gt=0, description="a request that takes longer is canceled")
    keep: Annotated[Address, AfterValidator(_find_folder)] | None = Field(
        None,
        description="a folder or any fsspec URL, of this service alone, where long jobs, with "
        "their prompts, and images by URL survive a restart; default: in memory",
    )
    keep_s: float = Field(
        3600,
        gt=0,
        description="how long images can be fetched by their URLs, and long jobs be polled after "
        "their end",
    )
    keep_mib: int = Field(
        1024,
        ge=1,
        description="of images, and as much of long jobs that have ended; evicted first are those "
        "fetched least recently, with `keep` the oldest",
    )
    keys: str | None = Field(
        None,
        description="a file of API keys in YAML, name: key; also SDBATCH_API_KEYS. Without "
        "keys, only requests from this machine are answered",
    )
    limits: Limits = Limits()
    public_url: Annotated[str, AfterValidator(_check_public_url)] | None = Field(
        None,
        description="the URL by which clients reach the service through a proxy; default: the one "
        "of each request",
    )
    cors_origins: list[Annotated[str, AfterValidator(_check_origin)]] = Field(
        [], description="origins whose pages may use the service in a browser"
    )
    log_prompts: bool = False

    @model_validator(mode="after")
    def _check_keep_time(self) -> "Serve":
        if self.keep_s < self.timeout_s:
            raise ValueError(
                f"keep_s = {self.keep_s:g}: must be at least timeout_s, {self.timeout_s:g}"
            )
        return self

"""The job file: what is asked for, as frozen pydantic models; load, overrides, JSON Schema.

Nothing here touches the prompt table, the model or the output, and no torch or ray is loaded.
"""

import difflib
import json
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from sdbatch import strict_yaml
from sdbatch.errors import JobError

Sampler = Literal[
    "ddim",
    "pndm",
    "euler",
    "euler_a",
    "heun",
    "dpmpp_2m",
    "dpmpp_2m_karras",
    "dpmpp_2m_sde",
    "unipc",
    "lcm",
]
Column = Literal[
    "id",
    "prompt",
    "negative_prompt",
    "seed",
    "num_inference_steps",
    "guidance_scale",
    "sampler",
    "height",
    "width",
]
MAX_SEED = 2**63 - 1
VAE_FACTOR = 8  # Rombach et al. 2022, sec. 4: f = 8 for Stable Diffusion 1.x


def _multiple_of_8(value: Any) -> Any:
    if type(value) in (int, float) and 0 < value <= 4096 and value % VAE_FACTOR:
        nearest = max(VAE_FACTOR, round(value / VAE_FACTOR) * VAE_FACTOR)
        raise ValueError(f"must be a multiple of 8, the VAE's factor. Nearest: {nearest}")
    return value


Pixels = Annotated[int, BeforeValidator(_multiple_of_8), Field(ge=8, le=4096, multiple_of=8)]


class Section(BaseModel):
    """A part of the job file: no unknown key, no guessed type, no change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Prompts(Section):
    """The prompt table."""

    path: str | list[str] = Field(
        description="parquet, csv, tsv, json, jsonl or txt (text also .gz): a file, a folder, "
        "a glob or a list of these; a local path or any fsspec URL. TSV is read without quoting."
    )
    columns: dict[Column, str] = Field({}, description="our name: the table's name")
    keep: list[str] | None = Field(
        None, description="the table's own columns that go into the output; default: all"
    )
    images_per_row: int = Field(1, ge=1)
    limit: int | None = Field(None, ge=1, description="read only the first rows of the table")


class Model(Section):
    """The model: a Stable Diffusion 1.5 or one of its shape."""

    path: str = Field(
        description="builtin:shapes, a hub id, a folder in diffusers' layout, or a single "
        ".safetensors or .ckpt file in the original layout"
    )
    revision: str | None = Field(None, description="of a hub id: a branch, tag or commit")
    config: str = Field(
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        description="for a single file: hub id or folder that gives its configuration, tokenizer",
    )
    sha256: str | None = Field(None, description="of the weights; filled in when the job begins")

    @property
    def name(self) -> str:
        """Return the model's name without any folder: what metadata calls it."""
        return self.path if self.path.startswith("builtin:") else Path(self.path).name


class Sampling(Section):
    """How an image is drawn. A column of the same name wins, row by row."""

    sampler: Sampler = "dpmpp_2m"
    num_inference_steps: int = Field(25, ge=1, le=1000)
    guidance_scale: float = Field(7.5, ge=1, le=1000, description="1 turns guidance off")
    negative_prompt: str = ""
    height: Pixels = 512
    width: Pixels = 512
    seed: int = Field(
        0,
        ge=0,
        le=MAX_SEED,
        description="a row's seed is drawn from this and the row's key, "
        "unless the table has a seed column",
    )


class EngineSettings(Section):
    """What draws. Part of the fingerprint once resolved: all of it can change bits."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    lanes: Literal["auto"] | Annotated[int, Field(ge=2)] = Field(
        "auto", description="rows of the UNet batch; a guided image takes two"
    )
    threads: int = Field(1, ge=1, description="of torch, on a CPU; more actors serve better")


class Cluster(Section):
    """Where it runs. Changes no byte of the output."""

    actors: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    gpus_per_actor: float = Field(1, gt=0, description="used when engine.device is cuda")
    cpus_per_actor: float | None = Field(
        None, gt=0, description="also the threads that encode images; default: engine.threads"
    )
    address: str | None = Field(
        None, description="of a Ray cluster; default: RAY_ADDRESS, else a Ray of this job's own"
    )


class Output(Section):
    """The dataset."""

    path: str = Field(min_length=1, description="a folder or any fsspec URL")
    format: Literal["parquet", "webdataset"] = "parquet"
    image_format: Literal["jpg", "png", "webp"] = "jpg"
    quality: int | None = Field(None, ge=1, le=100, description="default: 95 jpg, 90 webp")
    images_per_shard: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"

    @model_validator(mode="after")
    def _png_has_no_quality(self) -> "Output":
        if self.image_format == "png" and self.quality is not None:
            raise ValueError(
                f"output.quality = {self.quality}: png is lossless. Leave it out, or use jpg"
            )
        return self

    @property
    def encoder_quality(self) -> int:
        """Return the encoder's quality; PNG has none and ignores it."""
        return self.quality if self.quality is not None else {"webp": 90}.get(self.image_format, 95)


def _path_alone(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


class Job(Section):
    """A run over a prompt table."""

    name: str = Field(
        "", description="goes into the dataset card; default: output.path's last part"
    )
    prompts: Prompts
    model: Annotated[Model, BeforeValidator(_path_alone, json_schema_input_type=str | Model)]
    sampling: Sampling = Sampling()
    engine: EngineSettings = EngineSettings()
    cluster: Cluster = Cluster()
    output: Output

    @property
    def title(self) -> str:
        """Return the dataset's name."""
        return self.name or self.output.path.rstrip("/").rsplit("/", 1)[-1]


def load(path: str | Path, overrides: Sequence[str] = ()) -> Job:
    """Read the job file at `path`; each override is `section.key=value`, its value in YAML.

    Raises:
        JobError: the file cannot be read, or is no job: says which key and what it must be.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"{path} = {error}: must be a readable job file in YAML.") from error
    return parse(strict_yaml.parse(text, str(path)), overrides, str(path))


def parse(values: Any, overrides: Sequence[str] = (), where: str = "the job") -> Job:
    """Build a job from the mapping `values`, as YAML gives it; `where` it stands."""
    if not isinstance(values, dict):
        raise JobError(f"{where} = no mapping: must have prompts, model and output.")
    for override in overrides:
        values = _override(values, override)
    try:
        return Job.model_validate(values)
    except ValidationError as error:
        raise JobError(explain(error)) from error


def explain(error: ValidationError) -> str:
    """Say the first thing that is wrong in one line: where, what was found, what it must be."""
    first, *others = error.errors()
    where = _where(first)
    if first["type"] == "extra_forbidden":
        *parents, key = (str(part) for part in first["loc"])
        return f"{'.'.join([*parents, key])}: unknown key. {_suggest(parents, key)}"
    if first["type"] == "missing":
        return f"{where} = nothing: must be given."
    if first["type"] == "value_error" and " = " in first["msg"]:
        return f"{first['msg'].removeprefix('Value error, ')}."
    musts = [_must(first), *(_must(other) for other in others if _where(other) == where)]
    return f"{where} = {reprlib.repr(first['input'])}: must be {' or '.join(dict.fromkeys(musts))}."


def json_schema() -> str:
    """Return the job file's JSON Schema, for editors."""
    return json.dumps(Job.model_json_schema(), indent=2)


def _override(values: dict[str, Any], override: str) -> dict[str, Any]:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise JobError(f"--set {override!r}: must be section.key=value.")
    value = strict_yaml.parse(text, f"--set {override}") if text else ""
    return _set(values, name.split("."), value, override)


def _set(values: Any, keys: list[str], value: Any, override: str) -> dict[str, Any]:
    if isinstance(values, str) and override.startswith("model."):
        values = _path_alone(values)
    if not isinstance(values, dict | None):
        raise JobError(
            f"--set {override!r}: {keys[0]!r} is inside {values!r}, which is no section."
        )
    values = values or {}
    head, *rest = keys
    return {**values, head: _set(values.get(head), rest, value, override) if rest else value}


def _suggest(parents: list[str], key: str) -> str:
    section: Any = Job
    for parent in parents:
        section = section.model_fields[parent].annotation
    known = list(section.model_fields)
    close = difflib.get_close_matches(key, known, n=1)
    if close:
        return f"Did you mean {'.'.join([*parents, close[0]])!r}?"
    return f"Known: {', '.join(known)}."


def _where(error: Any) -> str:
    """Return the dotted key, without the names that pydantic adds for a union's branches."""
    branches = ("[key]", "str", "int", "constrained-int", "list[str]")
    parts = [str(part) for part in error["loc"] if part not in branches]
    return ".".join(part for part in parts if "literal[" not in part)


def _must(error: Any) -> str:
    plain = {
        "model_type": "a section of keys",
        "dict_type": "a section of keys",
        "string_type": "text",
        "int_type": "a whole number",
        "float_type": "a number",
        "finite_number": "a number",
        "list_type": "a list",
    }
    message = str(error["msg"]).removeprefix("Value error, ").removeprefix("must be ")
    return plain.get(error["type"], message.removeprefix("Input should be "))

"""The sections of the job file, as frozen pydantic models: what each key may be, and means."""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from sdbatch import samplers
from sdbatch.job.serving import Serve
from sdbatch.section import Section

Column = Literal[
    "id",
    "prompt",
    "negative_prompt",
    "seed",
    "num_inference_steps",
    "guidance_scale",
    "guidance_rescale",
    "guidance_start",
    "guidance_stop",
    "sampler",
    "eta",
    "height",
    "width",
    "clip_skip",
    "prompt_weights",
    "chunk_prompts",
]
MAX_SEED = 2**63 - 1
VAE_FACTOR = 8  # Rombach et al. 2022, sec. 4: f = 8 for Stable Diffusion 1.x


def _multiple_of_8(value: Any) -> Any:
    if type(value) in (int, float) and 0 < value <= 4096 and value % VAE_FACTOR:
        nearest = max(VAE_FACTOR, round(value / VAE_FACTOR) * VAE_FACTOR)
        raise ValueError(f"must be a multiple of 8, the VAE's factor. Nearest: {nearest}")
    return value


def _a_sampler(value: str) -> str:
    if value not in samplers.NAMES:
        known = samplers.NAMES if "_" in value else samplers.SAMPLERS
        close = difflib.get_close_matches(value, known, n=1)
        hint = f"Did you mean {close[0]!r}? " if close else ""
        raise ValueError(
            f"a sampler. {hint}Known: {', '.join(samplers.SAMPLERS)}; where a sampler has them "
            f"with _karras, _exponential, _beta or _ays for its steps"
        )
    return value


Sampler = Annotated[
    str, AfterValidator(_a_sampler), Field(json_schema_extra={"enum": list(samplers.NAMES)})
]
Lanes = Annotated[int, Field(ge=2)]
Share = Annotated[float, Field(ge=0, le=1)]
Pixels = Annotated[int, BeforeValidator(_multiple_of_8), Field(ge=8, le=4096, multiple_of=8)]


class Prompts(Section):
    """The prompt table: where it is, or its rows themselves."""

    path: str | list[str] | None = Field(
        None,
        description="parquet, csv, tsv, json, jsonl or txt (text also .gz): a file, a folder, "
        "a glob or a list of these; a local path or any fsspec URL. TSV is read without quoting.",
    )
    rows: list[dict[str, Any]] | None = Field(
        None, min_length=1, description="instead of path: each row as its columns and their values"
    )
    columns: dict[Column, str] = Field({}, description="our name: the table's name")
    keep: list[str] | None = Field(
        None, description="the table's own columns that go into the output; default: all"
    )
    images_per_row: int = Field(1, ge=1)
    limit: int | None = Field(None, ge=1, description="read only the first rows of the table")

    @model_validator(mode="after")
    def _is_one_table(self) -> "Prompts":
        if self.path is None and self.rows is None:
            raise ValueError("path = nothing: must be given, or rows in its place")
        if self.path is not None and self.rows is not None:
            raise ValueError("rows = rows beside path: a job has one table. Leave one of them out")
        return self

    @property
    def paths(self) -> list[str]:
        """Return where the table is; nothing where the job holds its rows."""
        return [self.path] if isinstance(self.path, str) else self.path or []


class Lora(Section):
    """A LoRA that is fused into the model."""

    path: str = Field(description="a .safetensors file")
    weight: float = Field(1, ge=-10, le=10)


class Embedding(Section):
    """A textual inversion: a word that prompts may use."""

    path: str = Field(description="a .safetensors, .pt or .bin file")
    token: str = Field(min_length=1, description="the word, such as <style>")


class Model(Section):
    """The model: a Stable Diffusion 1.5 or one of its shape."""

    path: str = Field(
        description="builtin:shapes, a hub id, a folder in diffusers' layout, or a single "
        ".safetensors or .ckpt file in the original layout"
    )
    revision: str | None = Field(None, description="of a hub id: a branch, tag or commit")
    variant: str | None = Field(
        None, pattern=r"^[\w-]+$", description="of a folder's or hub id's weights, such as fp16"
    )
    config: str = Field(
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        description="for a single file: hub id or folder that gives its configuration, tokenizer",
    )
    ema: bool = Field(True, description="of a single file that holds both: its averaged weights")
    prediction_type: Literal["epsilon", "v_prediction"] | None = Field(
        None, description="what the UNet predicts; default: as the model's configuration says"
    )
    zero_snr: bool | None = Field(
        None, description="trained to zero terminal SNR; default: as its configuration says"
    )
    vae: str | None = Field(None, description="another VAE: a folder, or a .safetensors file")
    loras: list[Lora] = Field([])
    embeddings: list[Embedding] = Field([])
    sha256: str | None = Field(None, description="of the weights; filled in when the job begins")

    @property
    def name(self) -> str:
        """Return the model's name without any folder: what metadata calls it."""
        return self.path if self.path.startswith("builtin:") else Path(self.path).name


class Sampling(Section):
    """How an image is drawn. A column of the same name wins, row by row."""

    sampler: Sampler = "dpmpp_2m"
    num_inference_steps: int = Field(25, ge=1, le=999)
    guidance_scale: float = Field(7.5, ge=1, le=1000, description="1 turns guidance off")
    guidance_rescale: Share = Field(0, description="0.7 keeps v-prediction models from glaring")
    guidance_start: Share = Field(0, description="guide from this part of the steps on")
    guidance_stop: Share = Field(1, description="guide up to this part of the steps")
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
    eta: Share = Field(0, description="noise that ddim and tcd add at every step")
    clip_skip: int = Field(
        0, ge=0, le=100, description="last layers of the text encoder to leave out"
    )
    prompt_weights: bool = Field(
        False, description="read (word), (word:1.3), [word] and \\( as AUTOMATIC1111 does"
    )
    chunk_prompts: bool = Field(
        False, description="encode all of a long prompt, 75 tokens at a time; else it is cut"
    )

    @model_validator(mode="after")
    def _fits_together(self) -> "Sampling":
        if self.eta and self.sampler not in ("ddim", "tcd"):
            raise ValueError(f"eta = {self.eta:g}: must be 0, as {self.sampler} has none")
        if self.guidance_start > self.guidance_stop:
            raise ValueError(
                f"guidance_start = {self.guidance_start:g}: must not be after guidance_stop, "
                f"{self.guidance_stop:g}"
            )
        return self


class EngineSettings(Section):
    """What draws. Part of the fingerprint once resolved: all of it can change bits."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    lanes: Literal["auto"] | Lanes | Annotated[dict[str, Lanes], Field(min_length=1)] = Field(
        "auto",
        description="rows of the UNet batch; a guided image takes two. By GPU where these are of "
        "several types: {H100: 64, T4: 16}",
    )
    threads: int = Field(1, ge=1, description="of torch, on a CPU; more actors serve better")
    channels_last: Literal["auto"] | bool = Field(
        "auto", description="keep images in memory pixel by pixel; auto: yes"
    )
    compile: Literal["auto"] | bool = Field(
        "auto", description="compile the UNet and the VAE, which takes minutes; auto: no"
    )


class Safety(Section):
    """Which images are not safe for work, and what is done about them."""

    checker: str = Field(
        "auto", description="a safety checker's folder, or none; auto: the model's, if it has one"
    )
    policy: Literal["flag", "blank", "drop"] = Field(
        "flag", description="mark it in the nsfw column; draw black instead; count it as failed"
    )


class Growing(Section):
    """As many actors as there is work for, on machines that come when they are asked for."""

    min: int = Field(0, ge=0, description="actors that are kept while there is work; one at least")
    max: int = Field(ge=1)

    @model_validator(mode="after")
    def _in_order(self) -> "Growing":
        if self.min > self.max:
            raise ValueError(f"min = {self.min}: must not be more than max, {self.max}")
        return self


class Cluster(Section):
    """Where it runs. Changes no byte of the output."""

    actors: Literal["auto"] | Annotated[int, Field(ge=1)] | Growing = Field(
        "auto",
        description="auto: as many as fit the cluster as it is; {min: 0, max: 64}: on a cluster "
        "that grows, as machines come",
    )
    label_selector: dict[str, str] = Field(
        {},
        description="nodes that may draw, by Ray's labels: "
        "{ray.io/accelerator-type: in(A100,H100)}",
    )
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
            raise ValueError(f"quality = {self.quality}: png is lossless. Leave it out, or use jpg")
        return self

    @property
    def encoder_quality(self) -> int:
        """Return the encoder's quality; PNG has none and ignores it."""
        return self.quality if self.quality is not None else {"webp": 90}.get(self.image_format, 95)


def path_alone(value: Any) -> Any:
    """Return the section of a model that is given by its path alone."""
    return {"path": value} if isinstance(value, str) else value


class Job(Section):
    """A run over a prompt table."""

    name: str = Field(
        "", description="goes into the dataset card; default: output.path's last part"
    )
    prompts: Prompts
    model: Annotated[Model, BeforeValidator(path_alone, json_schema_input_type=str | Model)]
    sampling: Sampling = Sampling()
    engine: EngineSettings = EngineSettings()
    cluster: Cluster = Cluster()
    output: Output
    safety: Safety = Safety()
    serve: Serve = Serve()

    @property
    def title(self) -> str:
        """Return the dataset's name."""
        return self.name or self.output.path.rstrip("/").rsplit("/", 1)[-1]

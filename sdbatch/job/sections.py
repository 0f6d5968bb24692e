"""The sections of the job file, as frozen pydantic models: the type and meaning of each key.

The sampling keys are in sdbatch/sampling.py.
"""

import codecs
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator

from sdbatch.job.files import FileKey
from sdbatch.job.row_values import check_row_value
from sdbatch.job.serving import Serve
from sdbatch.job.stages import Stage
from sdbatch.prompt_syntax import MAX_LORA_WEIGHT, choose_loras
from sdbatch.registry import (
    IMAGE_FORMATS,
    OUTPUT_FORMATS,
    REWRITES,
    ImageFormat,
)
from sdbatch.sampling import SIDE_MULTIPLE, Sampling
from sdbatch.section import Address, Section
from sdbatch.urls import FOLDER, names_folder, without_secrets

MOST_PLANNED = 10**9  # images of a job
TABLE_FORMATS = (
    *("parquet", "arrow", "csv", "tsv", "json", "jsonl", "txt"),
    "captions",  # a folder with a .txt file for each prompt
    "webdataset",
)
# Formats whose files each key of prompts.reader is about; an encoding is of all text.
READER_KEYS = {
    "separator": ("csv", "tsv"),
    "names": ("csv", "tsv"),
    "quotes": ("csv", "tsv"),
    "encoding": ("csv", "tsv", "json", "jsonl", "txt", "captions"),
    "field": ("json",),
}
PICTURES = ("image", "mask_image")  # columns of the prompt table that hold pictures
COLUMNS = ("id", "prompt", *Sampling.model_fields, *PICTURES)  # of the table, by our names
# Names of registries and of sampling keys, as types: an error and the JSON Schema list all of them.
if TYPE_CHECKING:
    Column: TypeAlias = str
    ImageFormatName: TypeAlias = str
    OutputFormatName: TypeAlias = str
    RewriteName: TypeAlias = str
    TableFormat: TypeAlias = str
else:
    Column = Literal[COLUMNS]
    ImageFormatName = Literal[tuple(IMAGE_FORMATS)]
    OutputFormatName = Literal[tuple(OUTPUT_FORMATS)]
    RewriteName = Literal[REWRITES]
    TableFormat = Literal[TABLE_FORMATS]
WEIGHTS = (".safetensors", ".bin", ".pt", ".ckpt")
ADAPTER_CONFIG = "adapter_config.json"  # of peft: the alpha and rank of its LoRA
LORA_FILE = FileKey(WEIGHTS, True, "LoRA", hub=True, companions=(ADAPTER_CONFIG,))
Lanes = Annotated[int, Field(ge=2)]
_QUALITIES = {name: each.quality for name, each in IMAGE_FORMATS.items() if each.quality}
_DEFAULT_QUALITIES = [f"{quality} {name}" for name, quality in _QUALITIES.items()]
_DEFAULT_CPUS = ", ".join(f"{each.cpus} for {name}" for name, each in IMAGE_FORMATS.items())
_COMPRESSED = [name for name, each in IMAGE_FORMATS.items() if each.compression is not None]


def _check_encoding(name: str) -> str:
    try:
        codecs.lookup(name).incrementaldecoder("strict").decode(b"")
        "".encode(name)
    except (LookupError, TypeError, UnicodeError) as error:
        raise ValueError("must be an encoding of text, such as utf-8, utf-16 or cp1252") from error
    return name


class Reader(Section):
    """How the table's files are read, where neither their names nor their contents say it."""

    format: TableFormat | None = Field(
        None,
        description="of all files; default: by suffix, then by content. captions: a folder with "
        "a .txt file for each prompt",
    )
    separator: str | None = Field(
        None, min_length=1, max_length=1, description="of fields; default: , ; | or a tab, as found"
    )
    names: list[str] | None = Field(
        None, min_length=1, description="of the columns of a CSV or TSV file without a header"
    )
    quotes: bool | None = Field(
        None,
        description="whether a field may be quoted; default: yes in CSV, in TSV as found",
    )
    encoding: Annotated[str, AfterValidator(_check_encoding)] = Field(
        "utf-8", description="of text files, such as utf-16 or cp1252"
    )
    field: str | None = Field(
        None,
        min_length=1,
        description="of a JSON document: where its rows are, such as data.prompts",
    )

    @model_validator(mode="after")
    def _check_keys(self) -> "Reader":
        if self.names is not None and len(set(self.names)) < len(self.names):
            raise ValueError(f"names = {self.names!r}: must differ from each other")
        for name, formats in READER_KEYS.items():
            default = type(self).model_fields[name].default
            if self.format not in (None, *formats) and getattr(self, name) != default:
                raise ValueError(
                    f"{name} = {getattr(self, name)!r}: is for {', '.join(formats)}, and format "
                    f"is {self.format}. Leave it out"
                )
        return self


class Prompts(Section):
    """The prompt table: its path, or its rows."""

    path: Annotated[Address | list[Address] | None, FileKey(table=True)] = Field(
        None,
        description="parquet, arrow, csv, tsv, json, jsonl or txt (text also .gz, .bz2, .xz or "
        ".zst), or WebDataset's tar: a file, a folder, a glob or a list of these; a local path or "
        "any fsspec URL",
    )
    reader: Reader = Reader()
    rows: list[dict[str, Any]] | None = Field(
        None, min_length=1, description="instead of path: each row as a mapping of its columns"
    )
    columns: dict[Column, str | None] = Field(
        {}, description="our name: the table's name; null: the table's column is not used"
    )
    keep: list[str] | None = Field(
        None, description="the table's own columns that go into the output; default: all"
    )
    source: str | None = Field(
        None, min_length=1, description="add a column of this name with the name of the row's file"
    )
    images_per_row: int = Field(1, ge=1, le=MOST_PLANNED)
    limit: int | None = Field(None, ge=1, description="read only the first rows of the table")
    size_from_image: bool = Field(
        False,
        description="rows with a picture that set neither height nor width have its size, rounded "
        f"down to a multiple of {SIDE_MULTIPLE}",
    )
    frames: int | None = Field(
        None,
        ge=2,
        le=10_000,
        description="draw each copy of a row as a sequence of that many images, whose `mix` goes "
        "from 0 to 1",
    )

    @model_validator(mode="after")
    def _check_one_table(self) -> "Prompts":
        if self.path is None and self.rows is None:
            raise ValueError("path = nothing: must be given, or rows instead")
        if self.path is not None and self.rows is not None:
            raise ValueError("rows = given together with path: a job has one table. Remove one")
        for number, row in enumerate(self.rows or ()):
            for name, value in row.items():
                check_row_value(f"rows.{number}.{name}", value)
        return self

    @property
    def row_images(self) -> int:
        """Return the number of images of a row."""
        return self.images_per_row * (self.frames or 1)

    @property
    def paths(self) -> list[str]:
        """Return the paths of the table; empty if the rows are in the job file."""
        return [self.path] if isinstance(self.path, str) else self.path or []


class Lora(Section):
    """A LoRA: without a name it is fused into the model, with one it is for rows that choose it."""

    path: Annotated[Address, LORA_FILE] = Field(
        description="a .safetensors, .bin, .pt or .ckpt file, a folder of diffusers or peft, or a "
        "hub id: owner/name, owner/name/file"
    )
    name: str | None = Field(
        None,
        pattern=r"^[^\s:,<>]([^:,<>]*[^\s:,<>])?$",
        description="rows choose it by this name, with `<lora:NAME:WEIGHT>` in the prompt or with "
        "the column or key `loras`",
    )
    weight: float = Field(
        1,
        ge=-MAX_LORA_WEIGHT,
        le=MAX_LORA_WEIGHT,
        description="with a name: where a row gives no weight",
    )


class Embedding(Section):
    """A textual inversion: a word that prompts may use."""

    path: Annotated[Address, FileKey(WEIGHTS, content="embedding", hub=True)] = Field(
        description="a .safetensors, .bin, .pt or .ckpt file, or a hub id: owner/name, "
        "owner/name/file"
    )
    token: str = Field(min_length=1, description="the word, such as <style>")


class Model(Section):
    """The model: Stable Diffusion 1.5 or one of the same architecture."""

    path: Annotated[Address, FileKey(elsewhere=True)] = Field(
        description="builtin:shapes, a hub id, a folder in diffusers' layout, or a single "
        ".safetensors or .ckpt file in the original layout"
    )
    revision: str | None = Field(None, description="of a hub id: a branch, tag or commit")
    variant: str | None = Field(
        None, pattern=r"^[\w-]+$", description="of a folder's or hub id's weights, such as fp16"
    )
    config: Annotated[Address, FileKey(elsewhere=True)] = Field(
        "builtin:sd1",
        description="for a single file: hub id or folder with its configuration and tokenizer; "
        "default: Stable Diffusion 1.5's, in the package",
    )
    ema: bool = Field(True, description="of a single file that holds both: its averaged weights")
    prediction_type: Literal["epsilon", "v_prediction"] | None = Field(
        None,
        description="what the UNet predicts; default: as the model's file or configuration says",
    )
    zero_snr: bool | None = Field(
        None, description="trained to zero terminal SNR; default: as its file or configuration says"
    )
    vae: Annotated[Address | None, FileKey(WEIGHTS, True, "VAE", hub=True)] = Field(
        None,
        description="another VAE: a folder, a .safetensors, .bin, .pt or .ckpt file, or a hub id: "
        "owner/name, owner/name/file",
    )
    loras: list[Lora] = Field([])
    embeddings: list[Embedding] = Field([])
    tiling: bool = Field(
        False,
        description="draw pictures whose opposite edges meet without a seam; of all rows, as it "
        "changes the model",
    )
    sha256: str | None = Field(None, description="of the weights; filled in when the job begins")

    @model_validator(mode="after")
    def _check_lora_names(self) -> "Model":
        names = [lora.name for lora in self.loras if lora.name is not None]
        for number, lora in enumerate(self.loras):
            if names.count(str(lora.name)) > 1:
                raise ValueError(f"loras.{number}.name = {lora.name!r}: must be used once")
        return self

    @property
    def row_loras(self) -> dict[str, float]:
        """Return the LoRAs that rows can choose: their names and default weights."""
        return {lora.name: lora.weight for lora in self.loras if lora.name is not None}

    @property
    def name(self) -> str:
        """Return the model's name without folders, as metadata writes it."""
        return self.path if self.path.startswith("builtin:") else Path(self.path).name


class EngineSettings(Section):
    """How the engine runs. Part of the fingerprint once resolved: each key can change bits."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "auto",
        description="of the weights; auto: float16 on a GPU; on a CPU as `sdbatch tune` found, "
        "else bfloat16 with AVX512-BF16, else float32",
    )
    lanes: Literal["auto"] | Lanes | Annotated[dict[str, Lanes], Field(min_length=1)] = Field(
        "auto",
        description="rows of the UNet batch; a guided image takes two. For several types of "
        "GPU: {H100: 64, T4: 16}; auto: as `sdbatch tune` found, else by memory and image size",
    )
    threads: int = Field(
        1, ge=1, description="of torch, on a CPU; more actors are faster than more threads"
    )
    channels_last: Literal["auto"] | bool = Field(
        "auto",
        description="torch's channels_last memory format; auto: as `sdbatch tune` found, else yes, "
        "but for bfloat16 on a CPU",
    )
    compile: Literal["auto"] | bool = Field(
        "auto",
        description="torch.compile the UNet and the VAE, which takes minutes; auto: only if "
        "`sdbatch tune` found it to be faster",
    )
    attention: Literal["auto", "torch", "cudnn", "flash", "efficient", "math"] = Field(
        "auto",
        description="the kernel of the UNet's attention, where it can compute a layer's shape; "
        "torch: torch chooses for each; auto: as `sdbatch tune` found, else torch",
    )
    decode_group: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto",
        description="images in a call of the VAE; auto: as `sdbatch tune` found, else "
        "4; at most half the lanes",
    )
    split_k: Literal["auto"] | bool = Field(
        "auto",
        description="sum matrix products in parts and in less precision, on a GPU; auto: yes, but "
        "if `sdbatch tune` found that an image depends on its place in a batch",
    )
    rewrites: Literal["auto"] | list[RewriteName] = Field(
        "auto",
        description="the same formulas in faster forms, which round differently; auto: what "
        "`sdbatch tune` found, else none",
    )
    fp8_linears: bool = Field(
        False,
        description="multiply the UNet's linear layers in 8 bits, which changes images; with "
        "torchao and bfloat16, on a GPU of compute capability 8.9 or more (L4, RTX 40, H100)",
    )


class Safety(Section):
    """Which images are not safe for work, and what happens to them."""

    checker: Annotated[Address, FileKey(folder=True, words=("auto", "none"))] = Field(
        "auto", description="a safety checker's folder, or none; auto: the model's, if it has one"
    )
    policy: Literal["flag", "blank", "drop"] = Field(
        "flag", description="mark it in the nsfw column; draw black instead; count it as failed"
    )


class Growing(Section):
    """As many actors as there is work for, on machines that an autoscaler adds."""

    min: int = Field(0, ge=0, description="actors to keep while there is work; at least one")
    max: int = Field(ge=1)

    @model_validator(mode="after")
    def _check_order(self) -> "Growing":
        if self.min > self.max:
            raise ValueError(f"min = {self.min}: must not be more than max, {self.max}")
        return self


class Cluster(Section):
    """Where the job runs. Changes no byte of the output."""

    actors: Literal["auto"] | Annotated[int, Field(ge=1)] | Growing = Field(
        "auto",
        description="auto: as many as fit the cluster as it is; {min: 0, max: 64}: on a cluster "
        "that grows, as machines join",
    )
    label_selector: dict[str, str] = Field(
        {},
        description="nodes that may draw, by Ray's labels: "
        "{ray.io/accelerator-type: in(A100,H100)}",
    )
    gpus_per_actor: float = Field(1, gt=0, description="used when engine.device is cuda")
    cpus_per_actor: float | None = Field(
        None,
        gt=0,
        description="also the threads that encode images; default on a GPU: "
        f"{_DEFAULT_CPUS}, or as many as the nodes have for each GPU; on a CPU: engine.threads",
    )
    address: Address | None = Field(
        None, description="of a Ray cluster; default: RAY_ADDRESS, else a Ray started for this job"
    )


def _check_folder(path: str) -> str:
    if not names_folder(path):
        raise ValueError(f"must be {FOLDER}")
    return path


class Output(Section):
    """The dataset."""

    path: Annotated[Address, AfterValidator(_check_folder)] = Field(
        description="a folder or any fsspec URL"
    )
    format: OutputFormatName = "parquet"
    image_format: ImageFormatName = "jpg"
    quality: int | None = Field(
        None,
        ge=1,
        le=100,
        description=f"default: {', '.join(_DEFAULT_QUALITIES)}",
    )
    compression: int | None = Field(
        None,
        ge=0,
        le=9,
        description=f"effort, of {' and '.join(_COMPRESSED)}, without loss: 0 is the fastest, 9 "
        f"makes the smallest files; default: {IMAGE_FORMATS['png'].compression}",
    )
    images_per_shard: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto",
        description="auto: up to 1000; fewer if images of the largest size, of the job or of a "
        "row, could have more than 256 MiB together",
    )

    @model_validator(mode="after")
    def _check_encoder(self) -> "Output":
        if self.quality is not None and self.encoder.quality is None:
            raise ValueError(
                f"quality = {self.quality}: {self.image_format} is lossless. "
                f"Leave it out, or use jpg"
            )
        if self.compression is not None and self.encoder.compression is None:
            raise ValueError(
                f"compression = {self.compression}: is for {' and '.join(_COMPRESSED)}, and "
                f"image_format is {self.image_format}. Leave it out"
            )
        return self

    @property
    def encoder(self) -> ImageFormat:
        """Return the properties of the image format."""
        return IMAGE_FORMATS[self.image_format]

    @property
    def encoder_quality(self) -> int | None:
        """Return the encoder's quality; None for a lossless format."""
        return self.encoder.quality if self.quality is None else self.quality


def model_section(value: Any) -> Any:
    """Return the model's section, also where the job gives only its path."""
    return {"path": value} if isinstance(value, str) else value


class Job(Section):
    """A run over a prompt table."""

    name: str = Field(
        "", description="goes into the dataset card; default: output.path's last part"
    )
    prompts: Prompts
    model: Annotated[Model, BeforeValidator(model_section, json_schema_input_type=str | Model)]
    sampling: Sampling = Sampling()
    engine: EngineSettings = EngineSettings()
    cluster: Cluster = Cluster()
    output: Output
    safety: Safety = Safety()
    stages: list[Stage] = Field(
        [],
        description="after drawing, in this order: {draw: {strength: 0.4, height: 768}} draws each "
        "image again from itself, with these sampling keys and else the row's; {score: shapes} "
        "adds columns to data/",
    )
    serve: Serve = Serve()

    @model_validator(mode="after")
    def _check_stages(self) -> "Job":
        for number, stage in enumerate(self.stages):
            if stage.draw is not None:
                if any(earlier.draw is None for earlier in self.stages[:number]):
                    raise ValueError(
                        f"stages.{number} = draw: must come before stages that look at the images"
                    )
                try:
                    self.sampling.updated(**stage.draw.model_dump())
                except ValidationError as error:
                    reason = str(error.errors()[0]["msg"]).removeprefix("Value error, ")
                    raise ValueError(f"stages.{number}.draw.{reason}") from error
            elif stage in self.stages[:number]:
                raise ValueError(f"stages.{number} = {stage}: must not repeat an earlier stage")
        return self

    @property
    def draw_again(self) -> list[dict[str, Any]]:
        """Return the sampling keys that each stage sets which draws again."""
        return [stage.draw.model_dump() for stage in self.stages if stage.draw is not None]

    @model_validator(mode="after")
    def _check_frames(self) -> "Job":
        if self.prompts.frames is not None and self.sampling.mix:
            raise ValueError(
                f"sampling.mix = {self.sampling.mix:g}: must be left out, as prompts.frames sets it"
            )
        return self

    @model_validator(mode="after")
    def _check_loras(self) -> "Job":
        try:
            choose_loras("", self.sampling.loras, self.model.row_loras)
        except ValueError as error:
            raise ValueError(f"sampling.{error}") from error
        return self

    @property
    def title(self) -> str:
        """Return the dataset's name."""
        return self.name or without_secrets(self.output.path).rstrip("/").rsplit("/", 1)[-1]

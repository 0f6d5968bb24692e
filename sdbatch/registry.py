"""What users pick by name, and the module behind each name. Nothing here imports those modules.

A new output format, image format, stage, scorer or model family is a file and one entry here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType


@dataclass(frozen=True)
class OutputFormat:
    """A file format of the dataset's shards. Its module has `write`, `read` and `card_features`."""

    suffix: str
    module: str


@dataclass(frozen=True)
class ImageFormat:
    """A file format of the images."""

    pillow: str  # Pillow's name of the format
    media_type: str
    api_name: str  # in OpenAI's API
    metadata: str  # where the parameters go: "exif", or "text" chunks
    quality: int | None  # the default; None: lossless, has no quality
    noise_bytes: float  # bound on the bytes a pixel at that quality: those of pure noise
    best_noise_bytes: float  # the same at a higher quality
    cpus: int  # of an actor with a GPU, so that encoding keeps up with it (benchmarks/encode.py)
    compression: int | None = None  # the default level; None: has none


@dataclass(frozen=True)
class StageKind:
    """A kind of stage that runs after drawing. Its module has `make`."""

    module: str
    choices: tuple[str, ...]  # values of the stage's key
    description: str = ""  # of the key, for the job's reference


OUTPUT_FORMATS: Mapping[str, OutputFormat] = {
    "parquet": OutputFormat("parquet", "sdbatch.output.formats.parquet"),
    "webdataset": OutputFormat("tar", "sdbatch.output.formats.webdataset"),
}
IMAGE_FORMATS: Mapping[str, ImageFormat] = {
    "jpg": ImageFormat("JPEG", "image/jpeg", "jpeg", "exif", 95, 1.2, 2.0, 2),
    "png": ImageFormat("PNG", "image/png", "png", "text", None, 3.05, 3.05, 4, 6),
    "webp": ImageFormat("WEBP", "image/webp", "webp", "exif", 90, 1.2, 1.2, 4),
}
# A scorer's module has COLUMNS and `score`.
SCORERS: dict[str, str] = {"shapes": "sdbatch.shapes.scorer"}
STAGES: dict[str, StageKind] = {
    "score": StageKind("sdbatch.stages.score", tuple(SCORERS), "add a scorer's columns to data/"),
}
# By the pipeline class in model_index.json. A family's module has LIMITS, LAYOUT and `load`.
FAMILIES: dict[str, str] = {
    "StableDiffusionPipeline": "sdbatch.models.sd1",
    # with the same parts; sd1 rejects a UNet that needs more
    "StableDiffusionImg2ImgPipeline": "sdbatch.models.sd1",
    "StableDiffusionInpaintPipeline": "sdbatch.models.sd1",
    "StableDiffusionInstructPix2PixPipeline": "sdbatch.models.sd1",
    "StableDiffusionControlNetPipeline": "sdbatch.models.sd1",
    "StableDiffusionPAGPipeline": "sdbatch.models.sd1",
    "LatentConsistencyModelPipeline": "sdbatch.models.sd1",
}
# Of a denoiser or a decoder: the same formula in another order, which rounds differently.
REWRITES = ("graphs", "group_norm_silu", "phase_upsample", "shared_prefix", "text_kv")
CUDA_REWRITES = ("graphs", "group_norm_silu")  # not for CPUs
EAGER_REWRITES = (*CUDA_REWRITES, "shared_prefix")  # not for a model that is compiled
EMBEDDED_MODEL = "builtin:shapes"


def load(module: str) -> ModuleType:
    """Import the module of an entry."""
    return import_module(module)

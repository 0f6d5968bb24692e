"""A model in one file, in CompVis' original layout: what its header says, checked without torch."""

import re
from pathlib import Path
from typing import Any

import yaml

from sdbatch.errors import ModelError, one_line
from sdbatch.job import Model
from sdbatch.models import identify
from sdbatch.models.headers import Header
from sdbatch.models.identify import TEXT_PREFIX, UNET_PREFIX, VAE_PREFIX, Kind

# The words for what a UNet predicts, of modelspec (Stability's metadata) and of model.yaml.
_PREDICTIONS = {
    "v": "v_prediction",
    "v_prediction": "v_prediction",
    "epsilon": "epsilon",
    "eps": "epsilon",
}
_WAYS = {
    identify.LORA: "Give it as model.loras, and the model that it changes as model.path.",
    identify.EMBEDDING: "Give it as model.embeddings, and a whole model as model.path.",
    identify.VAE: "Give it as model.vae, and a whole model as model.path.",
    identify.UNET: "Give the whole model, or a folder in diffusers' layout.",
    identify.TEXT_ENCODER: "Give the whole model, or a folder in diffusers' layout.",
}


def refusal(kind: Kind, path: str) -> str:
    """Return why no family loads a file of this kind."""
    way = _WAYS.get(kind.role, "Choose another model.")
    return (
        f"model.path = {path}: is {kind.words}: must be a whole {identify.SD1} checkpoint for text "
        f"to image. {way}"
    )


def check_parts(header: Header, settings: Model, path: str) -> None:
    """Raise a ModelError if a part of the model is missing, or is there only in part."""
    names = header.tensors
    if settings.vae is None and not _any(names, f"{VAE_PREFIX}decoder."):
        raise ModelError(
            f"model.path = {path}: has no VAE ({VAE_PREFIX}*): must be a whole model. Set "
            f"model.vae to one, such as stabilityai/sd-vae-ft-mse."
        )
    if not _any(names, f"{TEXT_PREFIX}transformer."):
        raise ModelError(
            f"model.path = {path}: has no text encoder ({TEXT_PREFIX}*): must be a whole model. "
            f"Download the full version of the model."
        )
    if settings.ema and has_averages(header):
        unet = [name for name in names if name.startswith(UNET_PREFIX)]
        lost = [name for name in unet if identify.averaged_name(name) not in names]
        if lost:
            raise ModelError(
                f"model.path = {path}: holds averaged weights of {len(unet) - len(lost)} of "
                f"{len(unet)} weights of its UNet: must hold all. Set model.ema to false, which "
                f"loads those that are not averaged."
            )


def check_architecture(header: Header, unet: dict[str, Any], path: str) -> None:
    """Raise a ModelError if the file's UNet is not the one that its configuration describes.

    Args:
        header: of the file.
        unet: the configuration of the UNet.
        path: of the file, for the error.
    """
    widths = {
        tensor.shape[1]
        for name, tensor in header.tensors.items()
        if name.endswith("attn2.to_k.weight") and name.startswith(UNET_PREFIX)
    }
    levels = len(unet.get("block_out_channels", ()))
    expected = levels * (unet.get("layers_per_block", 2) + 1)
    pattern = re.compile(re.escape(UNET_PREFIX) + r"input_blocks\.(\d+)\.")
    blocks = {found[1] for name in header.tensors if (found := pattern.match(name))}
    width = unet.get("cross_attention_dim")
    if widths - {width} or len(blocks) != expected:
        raise ModelError(
            f"model.path = {path}: its UNet has {len(blocks)} input blocks for text of width "
            f"{', '.join(map(str, sorted(widths)))}: must have {expected} for {width}, as "
            f"model.config says. Set model.config to the folder or hub id that it was made from."
        )


def adopt_training(header: Header, settings: Model, path: str) -> Model:
    """Return the settings with what the file says of its training, unless the job says it.

    Tensors named v_pred and ztsnr (ComfyUI, AUTOMATIC1111's forks), modelspec.prediction_type in
    the metadata, or the file model.yaml next to model.safetensors (AUTOMATIC1111).

    Raises:
        ModelError: the metadata says what is neither v nor epsilon, and the job says nothing.
    """
    found: dict[str, Any] = {}
    if settings.prediction_type is None:
        found["prediction_type"] = _prediction(header, Path(path))
    if settings.zero_snr is None and "ztsnr" in header.tensors:
        found["zero_snr"] = True
    return settings.updated(**found)


def has_averages(header: Header) -> bool:
    """Return whether a file holds averaged weights, and not only the averaging's own numbers."""
    return _any(header.tensors, f"{identify.AVERAGED_PREFIX}diffusion_model")


def _prediction(header: Header, file: Path) -> str | None:
    if "v_pred" in header.tensors:
        return "v_prediction"
    said = header.metadata.get("modelspec.prediction_type")
    where = "the metadata modelspec.prediction_type"
    if said is None:
        said, where = _parameterization(file), f"parameterization in {file.with_suffix('.yaml')}"
    if said is None:
        return None
    known = _PREDICTIONS.get(str(said).strip().lower())
    if known is None:
        raise ModelError(
            f"model.path = {file}: {where} is {str(said)[:40]!r}: must be v or epsilon. Set "
            f"model.prediction_type."
        )
    return known


def _parameterization(file: Path) -> Any:
    """Return what the configuration of the original code says, if it is next to the file."""
    config = file.with_suffix(".yaml")
    if not config.is_file():
        return None
    try:
        return yaml.safe_load(config.read_text(encoding="utf-8"))["model"]["params"].get(
            "parameterization"
        )
    except (yaml.YAMLError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ModelError(
            f"model.path = {file}: {config} cannot be read as its configuration "
            f"({one_line(error, 100)}). Mend it, or move it away."
        ) from error


def _any(names: dict[str, Any], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in names)

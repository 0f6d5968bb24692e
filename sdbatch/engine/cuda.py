"""What the engine's parts share of the device: its name, copies to it, and its failure."""

import re
from collections.abc import Mapping

import torch

from sdbatch.errors import ModelError


def name(kind: str) -> str:
    """Return what the device of this process calls itself, such as "NVIDIA H100 80GB HBM3"."""
    return torch.cuda.get_device_name() if kind == "cuda" else kind


def lanes(by_type: Mapping[str, int], name: str) -> int:
    """Return the lanes of the type of GPU that the device's `name` holds as words.

    Raises:
        ModelError: no type does.
    """
    for kind, count in by_type.items():
        if _words(kind) in _words(name):
            return count
    raise ModelError(
        f"engine.lanes = {', '.join(by_type)}: an actor's device is {name}, and it must be one of "
        f"these. Name its type too, or keep such machines out by cluster.label_selector."
    )


def _words(text: str) -> str:
    return f" {' '.join(re.findall('[a-z0-9]+', text.lower()))} "


def moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor of the CPU to `device`; the copy to a GPU is not waited for."""
    if device.type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def failed(error: Exception) -> ModelError:
    """Return what to tell those whose images a broken device will not draw."""
    text = " ".join(str(error).split())[:200]
    return ModelError(f"engine.device = failed ({text}): run the same command again to resume.")

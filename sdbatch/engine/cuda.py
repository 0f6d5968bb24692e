"""The device: its name, its memory, copies to it, its failure, and torch's compiler on it."""

import re
import sys
from collections.abc import Mapping

import torch

from sdbatch.errors import ModelError, one_line


def name(kind: str) -> str:
    """Return the name of this process's device, such as "NVIDIA H100 80GB HBM3"."""
    return torch.cuda.get_device_name() if kind == "cuda" else kind


def lanes(by_type: Mapping[str, int], name: str) -> int:
    """Return the lanes for a device: those of the GPU type whose words are in its `name`.

    Raises:
        ModelError: no type fits.
    """
    for kind, count in by_type.items():
        if _words(kind) in _words(name):
            return count
    raise ModelError(
        f"engine.lanes = {', '.join(by_type)}: must list the type of each GPU, and an actor has "
        f"{name}. Add its type, or exclude such machines with cluster.label_selector."
    )


def _words(text: str) -> str:
    return f" {' '.join(re.findall('[a-z0-9]+', text.lower()))} "


def moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor of the CPU to `device`, to a GPU without waiting for the copy."""
    if device.type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def release_cached_memory() -> None:
    """Give the GPU memory that torch caches for this process back, for another process."""
    torch.cuda.empty_cache()


def device_failed(error: Exception) -> ModelError:
    """Return the error of all requests of an engine whose device has failed."""
    return ModelError(
        f"The device failed ({one_line(error, 200)}). Run the same command again to resume."
    )


def allow_many_shapes() -> None:
    """Let the calling thread compile any number of shapes: by default torch stops after eight."""
    if "torch._dynamo" in sys.modules:  # imported where something is compiled
        torch._dynamo.config.recompile_limit = 10_000
        torch._dynamo.config.accumulated_recompile_limit = 10_000

"""What the engine's parts share of the device: copies to it, and its failure."""

import torch

from sdbatch.errors import ModelError


def moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor of the CPU to `device`; the copy to a GPU is not waited for."""
    if device.type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def failed(error: Exception) -> ModelError:
    """Return what to tell those whose images a broken device will not draw."""
    text = " ".join(str(error).split())[:200]
    return ModelError(f"engine.device = failed ({text}): run the same command again to resume.")

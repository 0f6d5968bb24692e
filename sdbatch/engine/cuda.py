"""The device: its name, its memory, copies to it, its failure, and torch's compiler on it."""

import logging
import os
import re
import sys
from collections.abc import Mapping, Sequence

import torch

from sdbatch import hardware
from sdbatch.errors import ModelError, one_line
from sdbatch.hardware import driver

HEADROOM = (2**30, 0.05)  # bytes, and of the GPU's memory: what must be free at the peak
_log = logging.getLogger(__name__)


def check_usable() -> None:
    """Raise a ModelError that names wheel and driver if torch cannot use this process's GPU."""
    wheel = f"engine.device = 'cuda': torch {torch.__version__}"
    version = driver()
    with_driver = f"with driver {version}" if version else "without an NVIDIA driver"
    built_for = torch.version.cuda or torch.version.hip
    if built_for is None:
        raise ModelError(
            f"{wheel}, on a machine {with_driver}: must be a wheel for CUDA, and this one is for "
            f"CPUs. Install one from https://pytorch.org, or set engine.device to cpu."
        )
    try:
        capability = torch.cuda.get_device_capability()
        name = torch.cuda.get_device_name()
    except (RuntimeError, AssertionError) as error:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        limit = "" if visible is None else f", CUDA_VISIBLE_DEVICES = {visible!r}"
        raise ModelError(
            f"{wheel} for CUDA {built_for}, {with_driver}{limit}: must find a GPU, and torch says: "
            f"{one_line(error).partition('. ')[0].rstrip('.')}. Update the driver, install a torch "
            f"wheel for an older CUDA, or make a GPU visible."
        ) from error
    kernels = torch.cuda.get_arch_list()
    if torch.version.cuda and not has_kernels(kernels, capability):
        raise ModelError(
            f"{wheel} for CUDA {built_for}, {with_driver}: must have kernels for {name}, which is "
            f"sm_{capability[0]}{capability[1]}, and has them for {', '.join(kernels)}. Install a "
            f"torch wheel for this GPU, or exclude such machines with cluster.label_selector."
        )


def has_kernels(kernels: Sequence[str], capability: tuple[int, int]) -> bool:
    """Tell whether a wheel's kernels, such as sm_90 and compute_90, run on a GPU.

    Those of sm_XY run on GPUs of the same major version and of no lower minor one. compute_XY is
    compiled by the driver, for any later GPU. An empty list says nothing.
    """
    for kernel in kernels:
        kind, digits = re.findall(r"[a-z]+|\d+", kernel)[:2]
        built = divmod(int(digits), 10)
        if built <= capability and (kind == "compute" or built[0] == capability[0]):
            return True
    return not kernels


def check_headroom(device: torch.device) -> None:
    """Warn if the peak of this process so far, such as of a warm-up, left little memory free."""
    if device.type != "cuda":
        return
    free, total = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device)
    free_at_peak = free + cached - torch.cuda.max_memory_reserved(device)
    warning = headroom_warning(free_at_peak, total)
    if warning is not None:
        _log.warning(warning)


def headroom_warning(free: int, total: int) -> str | None:
    """Return what a user should know if so many bytes of a GPU's memory are free at the peak."""
    least, part = HEADROOM
    if free >= max(least, part * total):
        return None
    return (
        f"Only {max(free, 0) / 2**30:.1f} of {total / 2**30:.1f} GiB of the GPU's memory are free. "
        f"With too little for its fastest algorithm cuDNN takes another one, so the bits of a row "
        f"may change from run to run. Reduce engine.lanes."
    )


def name(kind: str) -> str:
    """Return the name of this process's device, such as "NVIDIA H100 80GB HBM3"."""
    return torch.cuda.get_device_name() if kind == "cuda" else kind


def lanes(by_type: Mapping[str, int], name: str) -> int:
    """Return the lanes for a device: those of the GPU type whose words are in its `name`.

    Raises:
        ModelError: no type fits.
    """
    for kind, count in by_type.items():
        if hardware.is_of_type(name, kind):
            return count
    raise ModelError(
        f"engine.lanes = {', '.join(by_type)}: must list the type of each GPU, and an actor has "
        f"{name}. Add its type, or exclude such machines with cluster.label_selector."
    )


def moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor of the CPU to `device`, to a GPU without waiting for the copy."""
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def allow_split_k(allowed: bool) -> None:
    """Let matrix products be summed in parts and in less precision, as torch does by default.

    Which parts can depend on a row's place in the batch. A setting of the process.
    """
    matmul = torch.backends.cuda.matmul  # each takes (reduced precision, split-K)
    matmul.allow_fp16_reduced_precision_reduction = (allowed, allowed)
    matmul.allow_bf16_reduced_precision_reduction = (allowed, allowed)


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

"""The facts of the device that draws: those that decide bits. Receipts hold them."""

import os
from typing import Any

import torch

from sdbatch.engine.bits import recorded_environment
from sdbatch.hardware import driver, processor
from sdbatch.libraries import optional_libraries


def device_facts(kind: str) -> dict[str, Any]:
    """Return the facts of this process's device, as plain values; `kind` is cpu or cuda."""
    return {
        "kind": kind,
        **(_gpu_facts() if kind == "cuda" else _cpu_facts()),
        "instructions": torch.backends.cpu.get_cpu_capability(),  # noise is drawn on the CPU
        "environment": recorded_environment(kind, os.environ),
    }


def _gpu_facts() -> dict[str, Any]:
    gpu = torch.cuda.get_device_properties()
    return {
        "name": gpu.name,
        "multiprocessors": gpu.multi_processor_count,
        "capability": f"{gpu.major}.{gpu.minor}",
        "memory": gpu.total_memory,  # bytes
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "libraries": optional_libraries(),
        "driver": driver(),
    }


def _cpu_facts() -> dict[str, Any]:
    onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return {"name": processor().name, "onednn": onednn and bool(torch.backends.mkldnn.enabled)}

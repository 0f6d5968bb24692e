"""The facts of the device that draws: those that decide bits. Receipts hold them."""

import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

from sdbatch.engine.bits import recorded_environment
from sdbatch.libraries import gpu_libraries


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
        "libraries": gpu_libraries(),
        "driver": driver(),
    }


def _cpu_facts() -> dict[str, Any]:
    onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return {"name": _processor(), "onednn": onednn and bool(torch.backends.mkldnn.enabled)}


def driver(root: Path = Path("/")) -> str | None:
    """Return the version of the NVIDIA driver, as the kernel reports it; None: there is none.

    Args:
        root: the folder that holds /proc.
    """
    try:
        text = (root / "proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    found = re.search(r"\d+\.\d+(\.\d+)*", text)
    return found[0] if found else None


def _processor(root: Path = Path("/")) -> str:
    """Return the name of the processor; its architecture where Linux does not say more."""
    try:
        text = (root / "proc/cpuinfo").read_text()
    except OSError:  # not Linux
        text = ""
    found = re.search(r"^model name\s*:\s*(\S.*)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.machine()

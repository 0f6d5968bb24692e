"""The GPUs and the processor of this machine, found out without torch: the driver plans with it."""

import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

_QUERY = ("--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits")
_SECONDS = 20  # for which nvidia-smi may be silent: it starts the driver


@dataclass(frozen=True)
class Device:
    """A GPU or a processor by its name."""

    kind: str  # "cpu", "cuda"
    name: str  # such as "NVIDIA H100 80GB HBM3"
    driver: str = ""  # of a GPU
    memory: int | None = None  # of a GPU in bytes; None: not known
    is_here: bool = True  # else the name is Ray's of its type, such as H100


def gpus(root: Path = Path("/")) -> list[Device]:
    """Return the GPUs of this machine: from nvidia-smi, or without their memory from /proc.

    Args:
        root: the folder that holds /proc.
    """
    try:
        done = subprocess.run(
            ["nvidia-smi", *_QUERY], capture_output=True, text=True, timeout=_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return _gpus_of_proc(root)
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
    return [
        Device("cuda", name, driver, int(mib) * 2**20 if mib.isdigit() else None)
        for name, mib, driver in (row for row in rows if len(row) == 3)
    ]


def _gpus_of_proc(root: Path) -> list[Device]:
    version = driver(root) or ""
    cards = [
        file.read_text() for file in sorted(root.glob("proc/driver/nvidia/gpus/*/information"))
    ]
    names = [found[1].strip() for card in cards if (found := re.search(r"Model:(.*)", card))]
    return [Device("cuda", name, version) for name in names]


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


def processor(root: Path = Path("/")) -> Device:
    """Return this machine's processor: its name, and its model, as clouds hide the name.

    Args:
        root: the folder that holds /proc.
    """
    try:
        text = (root / "proc/cpuinfo").read_text()
    except OSError:  # not Linux
        text = ""
    lines = dict(re.findall(r"^([a-z ]+?)\s*: (.*)$", text, re.MULTILINE))
    words = [f"{key} {lines[key]}" for key in ("cpu family", "model") if key in lines]
    return Device("cpu", ", ".join([lines.get("model name", platform.machine()), *words]))


def is_of_type(name: str, kind: str) -> bool:
    """Tell whether the words of a type, such as RTX-PRO-6000, are in the name of a GPU."""
    return _words(kind) in _words(name)


def _words(text: str) -> str:
    return f" {' '.join(re.findall('[a-z0-9]+', text.lower()))} "

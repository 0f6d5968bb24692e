"""Writes the lock files beside it, from the environment whose Python runs it:

    .venv/bin/python docker/lock.py [TORCH_INDEX]

requirements.lock holds what both flavours of the image install, torch-cpu.lock and torch-gpu.lock
what differs: torch itself, and the CUDA libraries that PyPI's torch needs. pip resolves, with the
environment's versions as constraints, and says which file it would take; so run it on what the
image is: linux/amd64, Python 3.11. Development packages fall away as nothing asks for them.
"""

import json
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
INDEX = "https://download.pytorch.org/whl/cpu"
HEADER = """\
# Exact versions and hashes for linux/amd64, Python 3.11. To write them again:
#     .venv/bin/python docker/lock.py
"""


def pip(*arguments: str) -> str:
    """Run this Python's pip; return what it prints."""
    command = [sys.executable, "-m", "pip", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def resolve(torch: str, index: str) -> dict[str, str]:
    """Return the lock's line for each package of the image, with the `torch` of that version."""
    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text())
    # setuptools too: the image builds the project without asking a registry for it
    wanted = project["project"]["dependencies"] + project["build-system"]["requires"]
    here = pip("freeze", "--all", "--exclude-editable").splitlines()
    # ===, as 2.13.0+cpu would do for ==2.13.0
    held = [line for line in here if not line.startswith("torch==")] + [f"torch==={torch}"]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        constraints.write("\n".join(held))
        constraints.flush()
        where = ["--extra-index-url", index, "--constraint", constraints.name]
        how = ["--quiet", "--dry-run", "--ignore-installed", "--only-binary", ":all:"]
        report = json.loads(pip("install", *how, "--report", "-", *where, *wanted))
    lines = {}
    for package in report["install"]:
        name, version = package["metadata"]["name"].lower(), package["metadata"]["version"]
        sha256 = package["download_info"]["archive_info"]["hashes"]["sha256"]
        lines[name.replace("_", "-")] = f"{name}=={version} --hash=sha256:{sha256}\n"
    return lines


def main() -> None:
    """Write the three files."""
    index = sys.argv[1] if len(sys.argv) > 1 else INDEX
    freeze = pip("freeze").splitlines()
    torch = next(line[len("torch==") :] for line in freeze if line.startswith("torch=="))
    release = torch.split("+")[0]
    cpu, gpu = resolve(f"{release}+cpu", index), resolve(release, index)
    parts = {
        "requirements": {name: line for name, line in cpu.items() if gpu.get(name) == line},
        "torch-cpu": {name: line for name, line in cpu.items() if gpu.get(name) != line},
        "torch-gpu": {name: line for name, line in gpu.items() if cpu.get(name) != line},
    }
    for part, lines in parts.items():
        (HERE / f"{part}.lock").write_text(HEADER + "".join(lines[name] for name in sorted(lines)))


if __name__ == "__main__":
    main()

"""Write the lock files in this folder, from the environment of the Python that runs this script:

    .venv/bin/python docker/lock.py [TORCH_INDEX]

requirements.lock lists the packages that both flavours of the image install. torch-cpu.lock and
torch-gpu.lock list the differences: torch, and the CUDA libraries that the torch on PyPI needs. pip
resolves the packages with the versions of the environment as constraints, and reports the file of
each. So run this script on the platform of the image: linux/amd64, Python 3.11. Development
packages are left out, because no other package requires them.
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
    """Run pip of this Python; return its output."""
    command = [sys.executable, "-m", "pip", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def resolve(torch: str, index: str) -> dict[str, str]:
    """Return the line for the lock files of each package of the image with this torch."""
    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text())
    # with setuptools: the image builds the project without a registry
    wanted = project["project"]["dependencies"] + project["build-system"]["requires"]
    here = pip("freeze", "--all", "--exclude-editable").splitlines()
    # ===, because 2.13.0+cpu satisfies ==2.13.0
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

"""Write the lock files in this folder, with the versions of the environment that runs this script:

    .venv/bin/python docker/lock.py [TORCH_WHEELS]

requirements.lock lists the packages that both flavours of the image install. torch-cpu.lock and
torch-gpu.lock list the differences: torch, and the CUDA libraries that the torch on PyPI needs.
TORCH_WHEELS is a page of links to the CPU wheels of torch, by default PyTorch's, or a folder that
holds them. Development packages are left out, because no other package requires them.
"""

import importlib.metadata
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
PROJECT = HERE.parent / "pyproject.toml"
TORCH_WHEELS = "https://download.pytorch.org/whl/cpu/torch/"
HOW = [
    *("--python-version", "3.11", "--python-platform", "x86_64-manylinux_2_28"),
    *("--only-binary", ":all:", "--generate-hashes"),
    *("--no-annotate", "--no-header", "--quiet"),
]
HEADER = """\
# Exact versions and hashes for linux/amd64, Python 3.11. To write them again:
#     .venv/bin/python docker/lock.py
"""


def resolve(torch: str, *options: str) -> dict[str, str]:
    """Return the lines for the lock files of each package of the image with this torch."""
    # with setuptools: the image builds the project without a registry
    build = tomllib.loads(PROJECT.read_text())["build-system"]["requires"]
    installed = {each.name: each.version for each in importlib.metadata.distributions()}
    versions = installed | {"torch": torch}
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        constraints.writelines(f"{name}=={version}\n" for name, version in versions.items())
        constraints.flush()
        uv = [sys.executable, "-m", "uv", "pip", "compile", *HOW, *options]
        command = [*uv, "--constraint", constraints.name, str(PROJECT), "-"]
        compiled = subprocess.run(
            command, check=True, input="\n".join(build), stdout=subprocess.PIPE, text=True
        )
    lines = re.findall(r"^\S+==.*\n(?: .*\n)*", compiled.stdout, re.MULTILINE)
    return {each.partition("==")[0]: each for each in lines}


def main() -> None:
    """Write the three files."""
    release = importlib.metadata.version("torch").split("+")[0]
    wheels = sys.argv[1] if len(sys.argv) > 1 else TORCH_WHEELS
    cpu, gpu = resolve(f"{release}+cpu", "--find-links", wheels), resolve(release)
    parts = {
        "requirements": {name: line for name, line in cpu.items() if gpu.get(name) == line},
        "torch-cpu": {name: line for name, line in cpu.items() if gpu.get(name) != line},
        "torch-gpu": {name: line for name, line in gpu.items() if cpu.get(name) != line},
    }
    for part, lines in parts.items():
        (HERE / f"{part}.lock").write_text(HEADER + "".join(lines.values()))


if __name__ == "__main__":
    main()

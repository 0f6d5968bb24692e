"""GPUs that a machine without any seems to have: a script named nvidia-smi."""

import os


def install(folder, monkeypatch, *lines: str, code: int = 0, first: str = "") -> None:
    """Put an nvidia-smi that prints `lines` first on the PATH.

    Args:
        folder: of the script.
        monkeypatch: restores the PATH.
        lines: as `name, MiB, driver`.
        code: it exits with.
        first: a command of the shell before.
    """
    script = folder / "nvidia-smi"
    printed = "\n".join(f"echo '{line}'" for line in lines)
    script.write_text(f"#!/bin/sh\n{first}\n{printed}\nexit {code}\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

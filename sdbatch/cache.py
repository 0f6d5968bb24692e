"""The folder of what a machine keeps between commands: hashes of files, choices of `tune`.

All of it can be removed at any time.
"""

import os
import uuid
from pathlib import Path


def folder(name: str) -> Path:
    """Return the folder of one kind of entries; it may not exist yet."""
    if own := os.environ.get("SDBATCH_CACHE"):
        return Path(own).expanduser() / name
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "sdbatch" / name


def write(path: Path, text: str) -> None:
    """Write an entry whole or not at all, and its folder.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)

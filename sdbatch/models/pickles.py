"""What is inside a weights file, found out without torch and without running what it holds."""

import json
import pickletools
import zipfile
import zlib
from pathlib import Path

from sdbatch.errors import ModelError

_SAFE_MODULES = (
    "torch",
    "torch._utils",
    "collections",
    "_codecs",
)
# What json, zipfile, zlib and pickletools raise for bytes that are not theirs.
_UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    LookupError,
    RuntimeError,
    zlib.error,
    zipfile.BadZipFile,
)


def names(file: Path, where: str) -> set[str]:
    """Return the names of the tensors in a .safetensors file, or all texts in a pickle.

    Args:
        file: .safetensors, or anything that torch.save wrote.
        where: the job's key that names it, for the error.

    Raises:
        ModelError: it cannot be read, or its pickle would call more than torch.
    """
    try:
        return _safetensors(file) if file.suffix == ".safetensors" else _pickled(file, where)
    except _UNREADABLE as error:
        raise ModelError(
            f"{where} = {file}: cannot be read as weights ({error}). Fetch it again."
        ) from error


def _safetensors(file: Path) -> set[str]:
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if not 0 < length < file.stat().st_size:
            raise ValueError("no safetensors header")
        header = json.loads(opened.read(length))
    if not isinstance(header, dict):
        raise ValueError("no safetensors header")
    return set(header)


def _pickled(file: Path, where: str) -> set[str]:
    with zipfile.ZipFile(file) as archive:
        name = next((n for n in archive.namelist() if n.endswith("data.pkl")), None)
        if name is None:
            raise ValueError("no data.pkl")
        pickled = archive.read(name)
    strings: list[str] = []
    for operation, argument, _ in pickletools.genops(pickled):
        if isinstance(argument, str) and operation.name != "GLOBAL":
            strings.append(argument)
        called = None
        if operation.name == "GLOBAL":
            called = str(argument).partition(" ")
        elif operation.name == "STACK_GLOBAL":
            called = (strings[-2], " ", strings[-1])
        if called and called[0] not in _SAFE_MODULES:
            raise ModelError(
                f"{where} = {file}: its pickle would run {called[0]}.{called[2]}, so it was not "
                f"opened. Convert it to .safetensors where that is safe, or take another copy."
            )
    return set(strings)

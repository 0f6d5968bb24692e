"""The names of the tensors in a file of weights, without torch and without running its pickle."""

import pickletools
import zipfile
import zlib
from pathlib import Path

from safetensors import SafetensorError, safe_open

from sdbatch.errors import ModelError, one_line

_SAFE_MODULES = (
    "torch",
    "torch._utils",
    "collections",
    "_codecs",
)
# Raised by safetensors, zipfile, zlib and pickletools for bytes of another format.
_UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    LookupError,
    RuntimeError,
    zlib.error,
    zipfile.BadZipFile,
    SafetensorError,
)


def tensor_names(file: Path, where: str) -> set[str]:
    """Return the names of the tensors in a .safetensors file, or all strings in a pickle.

    Args:
        file: a .safetensors file, or one that torch.save wrote.
        where: the key of the job that names the file, for the error.

    Raises:
        ModelError: the file cannot be read, or its pickle would call code outside torch.
    """
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "numpy") as header:
                return set(header.keys())
        return _strings_in_pickle(file, where)
    except _UNREADABLE as error:
        raise ModelError(
            f"{where} = {file}: cannot be read as weights ({one_line(error, 200)}). "
            f"Download the file again."
        ) from error


def _strings_in_pickle(file: Path, where: str) -> set[str]:
    with zipfile.ZipFile(file) as archive:
        name = next((name for name in archive.namelist() if name.endswith("data.pkl")), None)
        if name is None:
            raise ValueError("no data.pkl")
        pickle_bytes = archive.read(name)
    strings: list[str] = []
    for operation, argument, _ in pickletools.genops(pickle_bytes):
        if isinstance(argument, str) and operation.name != "GLOBAL":
            strings.append(argument)
        function: tuple[str, ...] = ()  # that the pickle would call: module, name
        if operation.name == "GLOBAL":
            function = tuple(str(argument).split(" ", 1))
        elif operation.name == "STACK_GLOBAL":
            function = (strings[-2], strings[-1])
        if function and function[0] not in _SAFE_MODULES:
            raise ModelError(
                f"{where} = {file}: its pickle would run {'.'.join(function)}, so it was not "
                f"opened. Use a .safetensors file of these weights, or another copy of the file."
            )
    return set(strings)

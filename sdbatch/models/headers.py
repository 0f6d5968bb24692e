"""What a file of weights holds, without torch, without its data and without running a pickle.

The format is found by the file's bytes: people rename files. Pickles are unpickled with stand-ins
for torch's functions; anything else that a pickle would call is refused.
"""

import json
import pickle
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from sdbatch.errors import ModelError, one_line

_SAFE_MODULES = ("torch", "torch._utils", "torch.serialization", "collections", "_codecs")
_AGAIN = "Download the file again."
# What people have instead of weights: the first bytes, and the words for it.
_OTHER_FORMATS = (
    (b"version https://git-lfs", "is a git-lfs pointer, without the weights", "Run git lfs pull."),
    (b"<!doctype", "is a web page (HTML)", "Download the file itself, by its download link."),
    (b"<html", "is a web page (HTML)", "Download the file itself, by its download link."),
    (b"<?xml", "is an XML document", _AGAIN),
    (b"gguf", "is a GGUF file of quantised weights", "Use the .safetensors file of the model."),
    (b"\x89png", "is a picture (PNG)", "Give its .safetensors, .pt or .bin file."),
    (b"\xff\xd8\xff", "is a picture (JPEG)", "Give its .safetensors, .pt or .bin file."),
    (b"riff", "is a picture (WebP)", "Give its .safetensors, .pt or .bin file."),
    (b"7z\xbc\xaf\x27\x1c", "is a 7z archive", "Unpack it first."),
    (b"rar!", "is a RAR archive", "Unpack it first."),
    (b"\x1f\x8b", "is a gzip archive", "Unpack it first."),
    (b"\x89hdf", "is an HDF5 file of TensorFlow or Keras", "Use the .safetensors file."),
    (b"{", "is a JSON document", _AGAIN),
)
_NEITHER = "neither safetensors nor torch.save's format"
_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of torch.save's old format
_PROTOCOL = 1001  # the second
_DTYPES = {"Double": "F64", "Float": "F32", "Half": "F16", "BFloat16": "BF16", "Long": "I64"}
_DTYPES |= {"Int": "I32", "Short": "I16", "Char": "I8", "Byte": "U8", "Bool": "BOOL"}
# Raised by safetensors, zipfile, zlib and pickle for bytes of another format.
_UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    RuntimeError,
    MemoryError,
    zlib.error,
    zipfile.BadZipFile,
    pickle.UnpicklingError,
    SafetensorError,
)


@dataclass(frozen=True)
class Tensor:
    """A tensor of a file, without its data."""

    dtype: str  # safetensors' name, such as F16
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Header:
    """What a file of weights holds."""

    tensors: dict[str, Tensor]  # of a pickle without "state_dict.", nested names joined by dots
    metadata: dict[str, str] = field(default_factory=dict)  # of a .safetensors file


def read_header(file: Path, where: str) -> Header:
    """Return the names, shapes and dtypes of a file's tensors.

    Args:
        file: a .safetensors file, or one that torch.save wrote, in its new or its old format.
        where: the key of the job that names the file, for the error.

    Raises:
        ModelError: the file cannot be read, or its pickle would call code outside torch.
    """
    try:
        with file.open("rb") as opened:
            start = opened.read(64)
        _refuse_other_formats(file, start, where)
        if is_safetensors(start):
            return _read_safetensors(file)
        if start.startswith(b"PK"):
            return _header_of(_load_zip(file))
        if start.startswith(b"\x80"):
            return _header_of(_load_old(file))
        raise ValueError(_NEITHER)
    except _Unsafe as error:
        raise ModelError(
            f"{where} = {file}: its pickle would run {error}, so it was not opened. Use a "
            f".safetensors file of these weights, or another copy of the file."
        ) from error
    except _UNREADABLE as error:
        raise ModelError(
            f"{where} = {file}: cannot be read as weights ({_reason(file, error)}). {_AGAIN}"
        ) from error


def is_safetensors(start: bytes) -> bool:
    """Return whether the first bytes of a file are those of safetensors' format."""
    return start[6:9] == b"\0\0{"  # a length of 8 bytes, far below 2^48, and JSON


def _refuse_other_formats(file: Path, start: bytes, where: str) -> None:
    if not start:
        raise ModelError(f"{where} = {file}: is empty (0 bytes). {_AGAIN}")
    begin = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for magic, words, way in _OTHER_FORMATS:
        if begin.startswith(magic) and not is_safetensors(start):
            raise ModelError(f"{where} = {file}: {words}: must be weights. {way}")


def _reason(file: Path, error: BaseException) -> str:
    """Return why a file cannot be read; a file that ends early is the commonest reason."""
    if isinstance(error, SafetensorError):
        needed, size = _needed_bytes(file), file.stat().st_size
        if needed is not None and size < needed:
            return f"it is cut off: it has {size} bytes of {needed}"
    if isinstance(error, zipfile.BadZipFile | EOFError):
        return f"it is cut off or damaged: {one_line(error, 100)}"
    return one_line(error, 200)


def _needed_bytes(file: Path) -> int | None:
    """Return the size that a safetensors header gives; None if it is cut off itself, or damaged."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        size = file.stat().st_size
        if not 2 <= length <= 100_000_000:
            return None
        if size < 8 + length:
            return 8 + length
        try:
            header = json.loads(opened.read(length))
            ends = [entry["data_offsets"][1] for key, entry in header.items() if key[:2] != "__"]
            return 8 + length + max(map(int, ends), default=0)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return None


def _read_safetensors(file: Path) -> Header:
    with safe_open(file, "numpy") as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        tensors = {
            name: Tensor(str(each.get_dtype()), tuple(each.get_shape()))
            for name, each in slices.items()
        }
        return Header(tensors, dict(opened.metadata() or {}))


def _load_zip(file: Path) -> Any:
    with zipfile.ZipFile(file) as archive:
        name = next((name for name in archive.namelist() if name.endswith("data.pkl")), None)
        if name is None:
            raise ValueError("a zip archive without data.pkl: unpack it first")
        with archive.open(name) as opened:
            return _Unpickler(opened).load()


def _load_old(file: Path) -> Any:
    """Read the format of torch.save before 1.6: five pickles, then the storages."""
    with file.open("rb") as opened:
        magic = _Unpickler(opened).load()
        if magic != _MAGIC:
            raise ValueError(_NEITHER)
        if _Unpickler(opened).load() != _PROTOCOL:
            raise ValueError("an unknown version of torch.save's old format")
        _Unpickler(opened).load()  # the machine that wrote it
        return _Unpickler(opened).load()


class _Unsafe(Exception):
    """A pickle would call a function that is not torch's."""


class _Storage(str):
    """The name of a storage's class."""


class _Other:
    """Stands for what is no tensor, such as a device or a dtype."""


class _Dict(OrderedDict[Any, Any]):
    def __setstate__(self, state: Any) -> None:  # OrderedDict's own sets attributes
        pass


def _tensor(storage: Any, offset: Any, size: Any, *_: Any) -> Tensor:
    kind = str(storage).removesuffix("Storage")
    return Tensor(_DTYPES.get(kind, kind), tuple(int(side) for side in size))


def _first(value: Any, *_: Any) -> Any:
    return value


def _other(*_: Any) -> _Other:
    return _Other()


_STAND_INS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _first,
    ("torch._utils", "_rebuild_parameter_with_state"): _first,
    ("torch", "Size"): tuple,
    ("collections", "OrderedDict"): _Dict,
    ("collections", "defaultdict"): lambda *_: _Dict(),
    ("collections", "Counter"): _Dict,
}


class _Unpickler(pickle.Unpickler):
    """Builds plain values and `Tensor`s; calls nothing that the file names."""

    def find_class(self, module: str, name: str) -> Any:
        if module not in _SAFE_MODULES:
            raise _Unsafe(f"{module}.{name}")
        if name.endswith("Storage"):
            return _Storage(name)
        stand_in: Callable[..., Any] = _STAND_INS.get((module, name), _other)

        def call(*arguments: Any) -> Any:  # made for this pickle, which can change what it gets
            return stand_in(*arguments)

        return call

    def persistent_load(self, pid: Any) -> Any:
        return pid[1] if isinstance(pid, tuple) and pid[0] == "storage" else _Other()


def _header_of(content: Any) -> Header:
    if isinstance(content, Tensor):  # an embedding may be saved as a bare tensor
        return Header({"": content})
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    tensors: dict[str, Tensor] = {}
    _collect(content, "", tensors, depth=4)
    return Header(tensors)


def _collect(content: Any, prefix: str, tensors: dict[str, Tensor], depth: int) -> None:
    if isinstance(content, Tensor):
        tensors[prefix] = content
    elif depth and isinstance(content, dict):
        for name, value in content.items():
            _collect(value, f"{prefix}.{name}".lstrip("."), tensors, depth - 1)
    elif depth and isinstance(content, list | tuple):
        for number, value in enumerate(content):
            _collect(value, f"{prefix}.{number}".lstrip("."), tensors, depth - 1)

"""What loading any part of a model shares: one-line errors, and no weight made up at random."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from sdbatch.errors import ModelError, SdbatchError, one_line
from sdbatch.models.headers import is_safetensors


@contextmanager
def load_errors(where: str, path: str, must: str) -> Iterator[None]:
    """Turn what a library raises for the file `path` into one line that begins with a key.

    Raises:
        ModelError: with `must`, a sentence on what the file has to be.
    """
    try:
        yield
    except (SdbatchError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the libraries raise anything for a file that is not a model
        raise ModelError(
            f"{where} = {path!r}: cannot be loaded ({type(error).__name__}: "
            f"{one_line(error, 160)}). {must}"
        ) from error


def load_complete(kind: Any, path: str, **where: Any) -> Any:
    """Load a part; reject it if weights are missing, which the libraries initialise at random."""
    loaded, info = kind.from_pretrained(path, output_loading_info=True, **where)
    if info["missing_keys"]:
        raise ValueError(f"missing weights: {', '.join(sorted(info['missing_keys']))}")
    return loaded


def check_weights(part: Any, name: str) -> None:
    """Reject a part with weights that were never loaded, as a single file may lack some."""
    for key, weight in (*part.named_parameters(), *part.named_buffers()):
        if weight.is_meta:
            raise ValueError(f"weights of {name} are missing, such as {key}")


@contextmanager
def whole(name: str) -> Iterator[None]:
    """Say that weights of `name` are missing, where diffusers says that it cannot copy them."""
    try:
        yield
    except NotImplementedError as error:
        raise ValueError(f"weights of {name} are missing") from error


def read_weights(path: str) -> dict[str, Any]:
    """Return the tensors of a file of any format that `headers` reads, on the CPU.

    A pickle may hold other values, too; what it has in "state_dict" stands for all of it.
    """
    with Path(path).open("rb") as opened:
        start = opened.read(64)
    if is_safetensors(start):
        return dict(load_file(path))
    with Path(path).open("rb") as opened:  # torch would read a file by its name's ending
        content = torch.load(opened, map_location="cpu", weights_only=True)
    if isinstance(content, torch.Tensor):
        return {"": content}
    return dict(content.get("state_dict", content))


def read_metadata(path: str) -> dict[str, str]:
    """Return the metadata of a .safetensors file; none of a file of another format."""
    with Path(path).open("rb") as opened:
        start = opened.read(64)
    if not is_safetensors(start):
        return {}
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


def check_finite(part: Any, name: str) -> None:
    """Raise a ValueError if a weight of a part is NaN or infinite; pictures would be black."""
    weights = {key: weight for key, weight in part.named_parameters() if weight.numel()}
    if not weights:
        return
    # one transfer from a GPU for all; the greatest and the least are NaN if a value is
    bounds = [torch.stack(torch.aminmax(weight.detach())).float() for weight in weights.values()]
    finite = torch.stack(bounds).isfinite().all(1).tolist()
    for (key, weight), good in zip(weights.items(), finite, strict=True):
        if not good:
            kind = str(weight.dtype).removeprefix("torch.")
            raise ValueError(
                f"{name}.{key} holds values that are not finite in {kind}; if the file is whole, "
                f"set engine.dtype to float32"
            )

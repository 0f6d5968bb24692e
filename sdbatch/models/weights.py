"""What loading any part of a model shares: one-line errors, and no weight made up at random."""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers.loaders.single_file_utils import SingleFileComponentError
from safetensors import SafetensorError

from sdbatch.errors import ModelError, one_line

# Raised by diffusers, transformers, peft and safetensors for files that are not a model.
_FAULTS = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RuntimeError,
    SafetensorError,
    SingleFileComponentError,
    pickle.UnpicklingError,
)


@contextmanager
def load_errors(where: str, path: str, must: str) -> Iterator[None]:
    """Turn what a library raises for the file `path` into one line that begins with a key.

    Raises:
        ModelError: with `must`, a sentence on what the file has to be.
    """
    try:
        yield
    except _FAULTS as error:
        raise ModelError(
            f"{where} = {path!r}: cannot be loaded ({type(error).__name__}: "
            f"{one_line(error, 300)}). {must}"
        ) from error


def load_complete(kind: Any, path: str, **where: Any) -> Any:
    """Load a part; reject it if weights are missing, which the libraries initialise at random."""
    loaded, info = kind.from_pretrained(path, output_loading_info=True, **where)
    if info["missing_keys"]:
        raise ValueError(f"missing weights: {', '.join(sorted(info['missing_keys']))}")
    return loaded


def check_weights(part: Any, name: str) -> None:
    """Reject a part with weights that were never loaded, as a single file may lack some."""
    if any(weight.is_meta for weight in part.parameters()):
        raise ValueError(f"weights of {name} are missing")

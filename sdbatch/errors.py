"""The errors a user can cause, a small tree.

    SdbatchError
      JobError           the job file, its overrides, the options, the cluster
      PromptTableError   the prompt table
      ModelError         the model: missing, not a model, rejected, too big for the device
      StorageError       the output or any other file: missing, not readable, not writable

Each carries one line. Where a key, a column or a file is at fault:
`where = what was found: what it must be. The way out.`; otherwise a plain sentence and the way out.
No text of an error holds the secrets of a URL.
"""

import reprlib
from typing import Any

from sdbatch.urls import without_secrets


class SdbatchError(Exception):
    """Base of all errors that are shown as one line, without a traceback."""

    def __init__(self, text: str) -> None:
        super().__init__(without_secrets(text))


class JobError(SdbatchError):
    """The job cannot be run as it is written."""


class PromptTableError(SdbatchError):
    """The prompt table cannot be read as the job says."""


class ModelError(SdbatchError):
    """The model cannot be loaded or cannot draw."""


class StorageError(SdbatchError):
    """A file or folder cannot be read or written."""


def one_line(error: BaseException | str, limit: int | None = None) -> str:
    """Return the text of an error in one line, cut to `limit` characters, without secrets."""
    return without_secrets(" ".join(str(error).split()))[:limit]


def short_repr(value: Any) -> str:
    """Return the `repr` of a value, cut to a few words, without secrets."""
    return _SHORT.repr(value)


class _Short(reprlib.Repr):
    def repr_str(self, x: str, level: int) -> str:
        """Return a text; its secrets are removed before it is cut, which may cut one in two."""
        return super().repr_str(without_secrets(x), level)


_SHORT = _Short()
_SHORT.maxstring = 80  # a sha256 is shown whole
_SHORT.maxlist = _SHORT.maxdict = 8

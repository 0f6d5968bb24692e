"""The errors a user can cause, a small tree.

    SdbatchError
      JobError           the job file, its overrides, the options, the cluster
      PromptTableError   the prompt table
      ModelError         the model: missing, not a model, rejected, too big for the device
      StorageError       the output or any other file: missing, not readable, not writable

Each carries one line. Where a key, a column or a file is at fault:
`where = what was found: what it must be. The way out.`; otherwise a plain sentence and the way out.
"""


class SdbatchError(Exception):
    """Base of all errors that are shown as one line, without a traceback."""


class JobError(SdbatchError):
    """The job cannot be run as it is written."""


class PromptTableError(SdbatchError):
    """The prompt table cannot be read as the job says."""


class ModelError(SdbatchError):
    """The model cannot be loaded or cannot draw."""


class StorageError(SdbatchError):
    """A file or folder cannot be read or written."""


def one_line(error: BaseException | str, limit: int | None = None) -> str:
    """Return the text of an error in one line, cut to `limit` characters."""
    return " ".join(str(error).split())[:limit]

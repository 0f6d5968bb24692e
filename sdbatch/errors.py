"""The errors a user can cause, a small tree.

    SdbatchError
      JobError           the job file, its overrides, the options, the cluster asked for
      PromptTableError   the prompt table
      ModelError         the model: not found, not a model, refused, too big for the device
      StorageError       the output or any other file: not there, not readable, not writable

Each carries one line: `where = what was found: what it must be. The way out.`
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

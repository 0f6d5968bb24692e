"""Files on the Hugging Face hub: `owner/name`, `owner/name@revision`, `owner/name/file`.

huggingface_hub downloads them, or takes them from its cache. A job records the commit, so each
machine has the same files.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from sdbatch.errors import ModelError, one_line

_PATH = re.compile(r"([\w-][\w.-]*/[\w.-]+)(?:@([\w.-]+))?(?:/([^@]+))?")


@dataclass(frozen=True)
class HubPath:
    """A repository of the hub, or a file in it."""

    repository: str
    revision: str | None = None  # a branch, tag or commit
    file: str | None = None

    def __str__(self) -> str:
        """Return it as a job writes it."""
        revision = "" if self.revision is None else f"@{self.revision}"
        file = "" if self.file is None else f"/{self.file}"
        return f"{self.repository}{revision}{file}"


def parse(path: str) -> HubPath | None:
    """Return what `path` names on the hub; None if it can only be a local path."""
    found = _PATH.fullmatch(path)
    return HubPath(*found.groups()) if found else None


def download(path: HubPath, patterns: list[str], where: str) -> Path:
    """Return the local copy of a repository with the files of `patterns` that it has.

    Its name is the commit.

    Args:
        path: its repository and revision.
        patterns: names of files, with wildcards.
        where: the key of the job, for the error.

    Raises:
        ModelError: neither the hub nor its cache on this machine has the repository.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(path.repository, revision=path.revision, allow_patterns=patterns)
        )
    except (OSError, ValueError) as error:  # the hub's errors are both
        raise ModelError(
            f"{where} = {str(path)!r}: no such local file or folder, and the hub did not deliver "
            f"it ({one_line(error, 200)}). Check the path; offline, download it first."
        ) from error


def file_names(path: HubPath, folder: Path) -> list[str]:
    """Return the names of a repository's files; offline, of those that its cache has.

    Args:
        path: its repository.
        folder: from `download`, named after the commit.
    """
    from huggingface_hub import HfApi

    try:
        return sorted(HfApi().list_repo_files(path.repository, revision=folder.name))
    except (OSError, ValueError):
        return sorted(str(file.relative_to(folder)) for file in folder.rglob("*"))

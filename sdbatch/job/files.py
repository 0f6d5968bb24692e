"""The files and folders that a job names: a marker on their keys, and a walk over marked keys.

Packing, checking, hashing, identity and moving all follow from the marker.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sdbatch.section import Section

Part = TypeVar("Part", bound=Section)


@dataclass(frozen=True)
class FileKey:
    """Marks a key whose value names a file or a folder."""

    suffixes: tuple[str, ...] = ()  # of a file; none: it is a folder
    folder: bool = False  # also a folder, in diffusers' layout
    content: str = ""  # what models.identify must call it: LoRA, embedding, VAE
    hub: bool = False  # also a hub id: owner/name, owner/name@revision, owner/name/file
    words: tuple[str, ...] = ()  # values that name no file
    elsewhere: bool = False  # may be a hub id or built in; a file only if it exists here
    table: bool = False  # the prompt table
    companions: tuple[str, ...] = ()  # files that are read too if they are in a file's folder

    def may_be_elsewhere(self, path: str) -> bool:
        """Return whether a path that is not here can be a hub id or built in.

        One folder and a file's name, such as loras/style.safetensors, is a file that is missing.
        """
        named = self.hub and (not path.endswith(self.suffixes) or path.count("/") > 1)
        return self.elsewhere or named

    def companions_of(self, file: Path) -> list[Path]:
        """Return the companions that a file of this kind has."""
        found = [file.with_name(name) for name in self.companions]
        return [each for each in found if each.is_file()]


@dataclass(frozen=True)
class NamedFile:
    """A file or folder that a job names."""

    key: str  # model.loras.0.path
    path: str
    kind: FileKey


def named_files(section: Section, where: str = "") -> Iterator[NamedFile]:
    """Yield the files that a section names, in the order of its keys.

    Args:
        section: a section of the job, or the job.
        where: the section's own key in the job, such as "model"; "" for the job.
    """
    for name in type(section).model_fields:
        value, kind = getattr(section, name), _file_key(section, name)
        key = f"{where}.{name}".lstrip(".")
        if kind is not None:
            paths = [value] if isinstance(value, str) else value or []
            yield from (NamedFile(key, path, kind) for path in paths if path not in kind.words)
        elif isinstance(value, Section):
            yield from named_files(value, key)
        elif isinstance(value, list):
            for number, item in enumerate(value):
                if isinstance(item, Section):
                    yield from named_files(item, f"{key}.{number}")


def with_paths(section: Part, change: Callable[[NamedFile], str], where: str = "") -> Part:
    """Return `section` with `change` applied to the path of each file that it names."""
    values: dict[str, Any] = {}
    for name in type(section).model_fields:
        value, kind = getattr(section, name), _file_key(section, name)
        key = f"{where}.{name}".lstrip(".")
        new: Any = value
        if kind is not None and isinstance(value, str) and value not in kind.words:
            new = change(NamedFile(key, value, kind))
        elif kind is not None and isinstance(value, list):
            new = [change(NamedFile(key, path, kind)) for path in value]
        elif isinstance(value, Section):
            new = with_paths(value, change, key)
        elif isinstance(value, list):
            new = [
                with_paths(item, change, f"{key}.{number}") if isinstance(item, Section) else item
                for number, item in enumerate(value)
            ]
        if new != value:
            values[name] = new
    return section.updated(**values) if values else section


def _file_key(section: Section, name: str) -> FileKey | None:
    metadata = type(section).model_fields[name].metadata
    return next((each for each in metadata if isinstance(each, FileKey)), None)

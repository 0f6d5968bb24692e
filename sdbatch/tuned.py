"""What `sdbatch tune` has found, kept by device, versions, model and size; `auto` reads it.

An entry is a JSON file of the cache. No torch: the driver plans with it.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from sdbatch import cache, hardware
from sdbatch.errors import StorageError, one_line
from sdbatch.libraries import optional_libraries

_PACKAGES = ("sdbatch", "torch", "diffusers")


@dataclass(frozen=True)
class Choice:
    """The engine's values that draw fastest, by the names of their keys."""

    lanes: int
    dtype: str
    channels_last: bool
    compile: bool
    attention: str
    decode_group: int
    split_k: bool
    rewrites: list[str]


@dataclass(frozen=True)
class Key:
    """What a choice is good for."""

    device: str  # name of the GPU or the processor
    driver: str  # of the GPU
    versions: Mapping[str, str]
    model: str  # from `model_id`
    height: int  # pixels
    width: int  # pixels
    dtype: str  # "auto": the choice has one

    @property
    def file(self) -> Path:
        """Return the file of its entry."""
        text = json.dumps(asdict(self), sort_keys=True)
        return cache.folder("tune") / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


@dataclass(frozen=True)
class Entry:
    """A choice, and what it was chosen from."""

    key: Key
    choice: Choice
    date: str  # YYYY-MM-DD
    measured: list[dict[str, Any]]  # the lines of tune's table


def versions() -> dict[str, str]:
    """Return the versions that a choice depends on, read without importing the packages."""
    return {**{name: version(name) for name in _PACKAGES}, **optional_libraries()}


def model_id(path: str, revision: str | None, sha256: str | None) -> str:
    """Return what identifies a model: the hash of its files, on the hub also its commit."""
    on_hub = f"{path}@{revision}" if revision else ""
    return "+".join(filter(None, [on_hub, sha256]))


def read() -> tuple[list[Entry], list[str]]:
    """Return the entries of the cache, and a note for each file that is damaged."""
    entries, notes = [], []
    for file in sorted(cache.folder("tune").glob("*.json")):
        try:
            entries.append(TypeAdapter(Entry).validate_json(file.read_bytes()))
        except (OSError, ValidationError) as error:
            reason = one_line(error, 80)
            notes.append(f"{file} is damaged and was ignored ({reason}). Remove it, or tune again.")
    return entries, notes


def find(entries: Iterable[Entry], key: Key, *, is_here: bool = True) -> Entry | None:
    """Return the entry for a key, or None.

    Args:
        entries: from `read`.
        key: of the job.
        is_here: this machine has the device; else its name is that of a type, and any driver fits.
    """
    for entry in entries:
        known = entry.key
        if not is_here and hardware.is_of_type(known.device, key.device):
            known = replace(known, device=key.device, driver=key.driver)
        if known == key:
            return entry
    return None


def check_writable() -> None:
    """Raise a StorageError if the cache cannot be written."""
    probe = cache.folder("tune") / "probe"
    try:
        cache.write(probe, "")
        probe.unlink()
    except OSError as error:
        raise _not_writable(error) from error


def keep(entry: Entry) -> Path:
    """Write an entry in place of an older one for its key; return its file.

    Raises:
        StorageError: the cache cannot be written.
    """
    try:
        cache.write(entry.key.file, json.dumps(asdict(entry), indent=1) + "\n")
    except OSError as error:
        raise _not_writable(error) from error
    return entry.key.file


def _not_writable(error: OSError) -> StorageError:
    return StorageError(
        f"{cache.folder('tune')} = {one_line(error, 120)}: must be a folder that can be written. "
        f"Set SDBATCH_CACHE to another one."
    )

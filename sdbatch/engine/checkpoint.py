"""Where a model's files are and whether they are a model, found out without torch.

So that `sdbatch run` can refuse a wrong path or a hostile pickle before anything is started or
written. Loading (loading.py) trusts nothing of this: it reads pickles with weights_only.
"""

import hashlib
import json
import pickletools
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sdbatch.errors import ModelError

PARTS = ("text_encoder", "unet", "vae")
_FIRST_UNET_KEY = "model.diffusion_model.input_blocks.0.0.weight"  # of the original layout
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SAFE_MODULES = (
    "torch",
    "torch._utils",
    "collections",
    "_codecs",
    "numpy",
    "numpy.core.multiarray",
)
_WAYS = "Give a hub id, a folder in diffusers' layout, or one .safetensors or .ckpt file."


@dataclass(frozen=True)
class ModelFiles:
    """A model that was found; what loading needs to know of it."""

    kind: Literal["builtin", "folder", "file", "hub"]
    path: str  # builtin: its name; hub: its id
    revision: str | None  # hub: the commit
    config: str  # file: hub id or folder of its configuration


def find(path: str, revision: str | None, config: str) -> ModelFiles:
    """Find the model that a job names.

    Raises:
        ModelError: there is none, it is not a Stable Diffusion model, or its pickle holds code.
    """
    if path.startswith("builtin:"):
        if path != "builtin:shapes":
            raise ModelError(f"model.path = {path!r}: the only model built in is builtin:shapes.")
        return ModelFiles("builtin", "shapes", None, config)
    local = Path(path)
    if Path(config).exists():
        config = str(Path(config).resolve())  # an actor may stand in another folder
    if local.exists():
        if revision is not None:
            raise ModelError(f"model.revision = {revision!r}: only a hub id has one. Leave it out.")
        if local.is_dir():
            _check_folder(local)
            return ModelFiles("folder", str(local.resolve()), None, config)
        _check_file(local)
        return ModelFiles("file", str(local.resolve()), None, config)
    if not _HUB_ID.fullmatch(path) or path.startswith("."):
        raise ModelError(f"model.path = {path!r}: no such file or folder. {_WAYS}")
    return ModelFiles("hub", path, _commit(path, revision), config)


def sha256(files: ModelFiles) -> str | None:
    """Return the hash of the files that are loaded; None where the name and commit say it all.

    Raises:
        ModelError: a file cannot be read.
    """
    if files.kind in ("builtin", "hub"):
        return None
    root, config = Path(files.path), Path(files.config)
    loaded = [root, *sorted(_configs(config))] if root.is_file() else sorted(_loaded(root))
    digest = hashlib.sha256()
    try:
        for file in loaded:
            with file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
    except OSError as error:
        raise ModelError(
            f"model.path = {root}: cannot be read ({error}). Mend the copy."
        ) from error
    return digest.hexdigest()


def _loaded(root: Path) -> Iterator[Path]:
    yield from _configs(root)
    for part in PARTS:
        weights = list((root / part).glob("*.safetensors")) or list((root / part).glob("*.bin"))
        plain = [file for file in weights if "." not in file.stem]  # no variant such as .fp16
        yield from plain or weights


def _configs(root: Path) -> Iterator[Path]:
    """Yield a folder's configurations and the tokenizer's files; none where it is a hub id."""
    for part in ("tokenizer", "scheduler", *PARTS):
        yield from (root / part).glob("*.json")
        yield from (root / part).glob("*.txt")


def _check_folder(root: Path) -> None:
    if not (root / "model_index.json").is_file():
        raise ModelError(f"model.path = {root}: has no model_index.json. {_WAYS}")
    for part in (*PARTS, "tokenizer", "scheduler"):
        if not (root / part).is_dir():
            raise ModelError(f"model.path = {root}: has no folder {part}/. {_WAYS}")
        if part in PARTS and not (root / part / "config.json").is_file():
            raise ModelError(f"model.path = {root}: has no {part}/config.json. {_WAYS}")
    for part in PARTS:
        if not list((root / part).glob("*.safetensors")) + list((root / part).glob("*.bin")):
            raise ModelError(
                f"model.path = {root}: has no weights in {part}/. Fetch the model whole."
            )


def _check_file(file: Path) -> None:
    try:
        if file.suffix == ".safetensors":
            keys = _safetensors_keys(file)
        elif file.suffix == ".ckpt":
            keys = _pickle_strings(file)
        else:
            raise ModelError(f"model.path = {file}: must end in .safetensors or .ckpt. {_WAYS}")
    except (OSError, ValueError, KeyError, IndexError, zipfile.BadZipFile) as error:
        raise ModelError(
            f"model.path = {file}: cannot be read as a model ({error}). {_WAYS}"
        ) from error
    if _FIRST_UNET_KEY not in keys:
        raise ModelError(f"model.path = {file}: holds no Stable Diffusion UNet. {_WAYS}")


def _safetensors_keys(file: Path) -> set[str]:
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if not 0 < length < file.stat().st_size:
            raise ValueError("no safetensors header")
        return set(json.loads(opened.read(length)))


def _pickle_strings(file: Path) -> set[str]:
    """Return the strings in a checkpoint's pickle; refuse one that would call more than torch."""
    with zipfile.ZipFile(file) as archive:
        name = next((n for n in archive.namelist() if n.endswith("data.pkl")), None)
        if name is None:
            raise ValueError("no data.pkl")
        pickled = archive.read(name)
    strings: list[str] = []
    for operation, argument, _ in pickletools.genops(pickled):
        if isinstance(argument, str) and operation.name != "GLOBAL":
            strings.append(argument)
        called = None
        if operation.name == "GLOBAL":
            called = str(argument).partition(" ")
        elif operation.name == "STACK_GLOBAL":
            called = (strings[-2], " ", strings[-1])
        if called and called[0] not in _SAFE_MODULES:
            raise ModelError(
                f"model.path = {file}: its pickle would run {called[0]}.{called[2]}, so it was not "
                f"opened. Convert it to .safetensors where that is safe, or take another copy."
            )
    return set(strings)


def _commit(path: str, revision: str | None) -> str:
    """Return the commit that `revision` of the hub id `path` is now; needs the hub or its cache."""
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(path, revision=revision, allow_patterns=["model_index.json"])
    except (OSError, ValueError) as error:  # the hub's errors are both
        text = " ".join(str(error).split())[:200]
        raise ModelError(
            f"model.path = {path!r}: no such folder here, and the hub gave none ({text}). {_WAYS}"
        ) from error
    if not (Path(folder) / "model_index.json").is_file():
        raise ModelError(f"model.path = {path!r}: has no model_index.json on the hub. {_WAYS}")
    return Path(folder).name

"""Where a model's files are and whether they are a model, found out without torch.

So `sdbatch run` can reject a wrong path or a hostile pickle before it starts or writes anything.
Loading does not rely on these checks: it reads pickles with weights_only.
"""

import hashlib
import json
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from sdbatch import registry
from sdbatch.errors import ModelError, one_line
from sdbatch.job import Model, Safety
from sdbatch.job.files import NamedFile, named_files, with_paths
from sdbatch.models import pickles
from sdbatch.models.file_hash import file_sha256
from sdbatch.registry import EMBEDDED_MODEL

BUILTIN = Path(__file__).parent.parent / "builtin"  # a folder for each model in the package
CHECKER = "safety_checker"  # its folder in a model's folder
OWN_CHECKER = "own"  # of ModelFiles.checker: the one in the model's own folder
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_WAYS = "Give a hub id, a folder in diffusers' layout, or one .safetensors or .ckpt file."
_DOWNLOAD = "Download it first; a hub id does not work here."


@dataclass(frozen=True)
class Layout:
    """The files of a family's models. Its folder has them as LAYOUT."""

    weights: tuple[str, ...]  # folders of a model in diffusers' layout that hold weights
    configs: tuple[str, ...]  # folders that hold only configurations
    first_key: str  # a tensor that every single file of the family has


@dataclass(frozen=True)
class ModelFiles:
    """A model that was found: all that loading needs."""

    kind: Literal["builtin", "folder", "file", "hub"]
    path: str  # builtin: as the job names it, as each machine has its own package; hub: its id
    family: str  # module of its family
    settings: Model  # the job's, with absolute paths and the variant that is loaded
    checker: str | None = None  # a folder, OWN_CHECKER or None
    expected_sha256: str | None = None  # of the files on the driver's machine

    @property
    def root(self) -> str:
        """Return where diffusers and transformers load it from."""
        if self.kind == "builtin":
            return str(BUILTIN / self.path.removeprefix("builtin:"))
        return self.path

    @property
    def revision(self) -> str | None:
        """Return the commit of a hub id."""
        return self.settings.revision

    @property
    def layout(self) -> Layout:
        """Return the layout of its family."""
        return _layout(self.family)


def find_model(settings: Model, safety: Safety) -> ModelFiles:
    """Find the model that a job names, and its safety checker.

    Raises:
        ModelError: there is none, no family loads it, a file that goes with it is missing, or a
            pickle holds code.
    """
    path = settings.path
    settings = with_paths(settings, _checked_path, "model")
    safety = with_paths(safety, _checked_path, "safety")
    checker = None if safety.checker in ("auto", "none") else safety.checker
    _refuse_options_of_other_kinds(settings)
    local = Path(path)
    if not local.exists() and not path.startswith("builtin:"):
        return _find_on_hub(settings, checker, safety.checker == "auto")
    if settings.revision is not None:
        raise ModelError(
            f"model.revision = {settings.revision!r}: only a hub id has one. Leave it out."
        )
    if path.startswith("builtin:"):
        return _find_builtin(settings, checker)
    if local.is_dir():
        family = _check_folder(local)
        if safety.checker == "auto" and (local / CHECKER / "config.json").is_file():
            checker = OWN_CHECKER
        variant = _choose_variant(local, _layout(family), settings.variant)
        settings = settings.updated(variant=variant)
        return ModelFiles("folder", str(local.resolve()), family, settings, checker)
    return ModelFiles("file", str(local.resolve()), _check_file(local), settings, checker)


def _find_builtin(settings: Model, checker: str | None) -> ModelFiles:
    if settings.path != EMBEDDED_MODEL:
        raise ModelError(
            f"model.path = {settings.path!r}: the only embedded model is {EMBEDDED_MODEL}."
        )
    files = ModelFiles("builtin", settings.path, "", settings, checker)
    files = replace(files, family=_check_folder(Path(files.root)))
    return replace(files, expected_sha256=sha256(files))


def _find_on_hub(settings: Model, checker: str | None, auto: bool) -> ModelFiles:
    path = settings.path
    if not _HUB_ID.fullmatch(path) or path.startswith("."):
        raise ModelError(f"model.path = {path!r}: no such file or folder. {_WAYS}")
    file = _download_index(path, settings.revision)
    index = _read_index(file, path)
    if auto and (index.get(CHECKER) or [None])[0]:
        checker = OWN_CHECKER
    settings = settings.updated(revision=file.parent.name)
    return ModelFiles("hub", path, _family_of(index, path), settings, checker)


def sha256(files: ModelFiles) -> str | None:
    """Return the hash of the files that are loaded; None if name and commit identify them.

    Raises:
        ModelError: a file cannot be read.
    """
    digest = hashlib.sha256()
    loaded = hashed_files(files)
    try:
        for file in loaded:
            digest.update(bytes.fromhex(file_sha256(file)))
    except OSError as error:
        raise ModelError(
            f"model.path = {files.path}: cannot be read ({error}). Download the model again."
        ) from error
    return digest.hexdigest() if loaded else None


def check_hash(files: ModelFiles) -> None:
    """Raise a ModelError if the files on this machine differ from those that the driver found."""
    expected = files.expected_sha256
    own = None if expected is None else sha256(files)
    if own != expected:
        raise ModelError(
            f"model.path = {files.path}: its sha256 is {own} on {socket.gethostname()}: must be "
            f"{expected}, as when the run began. Give all machines the same files and the same "
            f"sdbatch, and do not change them during a run."
        )


def hashed_files(files: ModelFiles) -> list[Path]:
    """Return the files whose hash identifies the model, in the order of that hash."""
    loaded = list(_extra_files(files))
    if files.kind in ("builtin", "folder"):
        loaded += sorted(_folder_files(files))
    elif files.kind == "file":
        loaded += [Path(files.path), *sorted(_configs(Path(files.settings.config), files.layout))]
    return loaded


def _folder_files(files: ModelFiles) -> Iterator[Path]:
    root, variant = Path(files.root), files.settings.variant
    yield from _configs(root, files.layout)
    for part in files.layout.weights:
        yield from _weights(root / part, variant)
    if files.checker == OWN_CHECKER:
        yield root / CHECKER / "config.json"
        yield from _weights(root / CHECKER, _checker_variant(root, variant))


def _extra_files(files: ModelFiles) -> Iterator[Path]:
    """Yield the files that are loaded from elsewhere: parts of the model, then what is fused."""
    extras = [file for file in named_files(files.settings, "model") if not file.kind.elsewhere]
    parts = [file.path for file in extras if file.kind.folder]
    if files.checker not in (None, OWN_CHECKER):
        parts.append(str(files.checker))
    for folder in map(Path, parts):
        if folder.is_file():
            yield folder
        else:
            yield from sorted([*folder.glob("*.json"), *_weights(folder, None)])
    yield from (Path(file.path) for file in extras if not file.kind.folder)


def _weights(folder: Path, variant: str | None) -> list[Path]:
    """Return the files of weights of one part that diffusers would load."""
    return [file for file in _all_weights(folder) if _variant_of(file) == (variant or "")]


def _all_weights(folder: Path) -> list[Path]:
    return [*folder.glob("*.safetensors")] or [*folder.glob("*.bin")]


def _variant_of(file: Path) -> str:
    return file.stem.partition(".")[2]  # of diffusion_pytorch_model.fp16.safetensors: fp16


def _choose_variant(root: Path, layout: Layout, given: str | None) -> str | None:
    """Return the variant to load: the given one, none, or the only one that there is."""
    common = set.intersection(*(_variants(root / part) for part in layout.weights))
    if given is None and "" in common:
        return None
    if given in common:
        return given
    names = sorted(common)
    if given is None and len(names) == 1:
        return names[0]
    raise ModelError(
        f"model.variant = {given!r}: all parts of {root} have "
        f"{', '.join(name or 'plain weights' for name in names) or 'no variant in common'}. "
        f"Set model.variant to one of these, or leave it out."
    )


def checker_variant(files: ModelFiles) -> str | None:
    """Return the variant of the model's own checker: plain weights if it has no other."""
    variant = files.settings.variant
    return variant if files.kind == "hub" else _checker_variant(Path(files.path), variant)


def _checker_variant(root: Path, variant: str | None) -> str | None:
    return variant if variant in _variants(root / CHECKER) else None


def _variants(folder: Path) -> set[str]:
    return {_variant_of(file) for file in _all_weights(folder)}


def _checked_path(file: NamedFile) -> str:
    """Return the absolute path of a file that a job names; an actor has another working folder.

    Raises:
        ModelError: it is missing, or is not what its key needs.
    """
    path, kind = Path(file.path), file.kind
    if kind.elsewhere:
        return str(path.resolve()) if path.exists() else file.path
    if kind.folder and (path.is_dir() or not kind.suffixes):
        if not (path / "config.json").is_file() or not _weights(path, None):
            raise ModelError(
                f"{file.key} = {file.path!r}: must be a local folder with config.json and "
                f"weights. {_DOWNLOAD}"
            )
        return str(path.resolve())
    if not path.is_file() or path.suffix not in kind.suffixes:
        raise ModelError(
            f"{file.key} = {file.path!r}: must be a local file that ends in "
            f"{', '.join(kind.suffixes)}. {_DOWNLOAD}"
        )
    names = pickles.tensor_names(path, file.key)
    if kind.content and not any(kind.content.lower() in name.lower() for name in names):
        raise ModelError(
            f"{file.key} = {file.path!r}: holds no {kind.content}. Give the file of a "
            f"{kind.content}."
        )
    return str(path.resolve())


def _configs(root: Path, layout: Layout) -> Iterator[Path]:
    """Yield a folder's configurations and the tokenizer's files; none if it is a hub id."""
    for part in (*layout.configs, *layout.weights):
        yield from (root / part).glob("*.json")
        yield from (root / part).glob("*.txt")


def _refuse_options_of_other_kinds(settings: Model) -> None:
    file = Path(settings.path).is_file()
    if settings.variant is not None and (settings.path.startswith("builtin:") or file):
        raise ModelError(
            f"model.variant = {settings.variant!r}: only a folder or hub id has variants. "
            f"Leave it out."
        )
    if not settings.ema and not file:
        raise ModelError("model.ema = False: only a single file can hold both. Leave it out.")


def _check_folder(root: Path) -> str:
    """Return the family of a folder; raise a ModelError if a part is missing."""
    index = root / "model_index.json"
    if not index.is_file():
        raise ModelError(f"model.path = {root}: has no model_index.json. {_WAYS}")
    family = _family_of(_read_index(index, str(root)), str(root))
    layout = _layout(family)
    for part in (*layout.weights, *layout.configs):
        if not (root / part).is_dir():
            raise ModelError(f"model.path = {root}: has no folder {part}/. {_WAYS}")
        if part in layout.weights and not (root / part / "config.json").is_file():
            raise ModelError(f"model.path = {root}: has no {part}/config.json. {_WAYS}")
    for part in layout.weights:
        if not _all_weights(root / part):
            raise ModelError(
                f"model.path = {root}: has no weights in {part}/. Download the whole model."
            )
    return family


def _check_file(file: Path) -> str:
    """Return the family of a single file; raise a ModelError if no family can load it."""
    if file.suffix not in (".safetensors", ".ckpt"):
        raise ModelError(f"model.path = {file}: must end in .safetensors or .ckpt. {_WAYS}")
    names = pickles.tensor_names(file, "model.path")
    for family in registry.FAMILIES.values():
        if _layout(family).first_key in names:
            return family
    raise ModelError(f"model.path = {file}: holds no model of a known family. {_WAYS}")


def _family_of(index: dict[str, Any], path: str) -> str:
    name = index.get("_class_name")
    if name not in registry.FAMILIES:
        raise ModelError(
            f"model.path = {path}: its model_index.json names the pipeline {name!r}: must be one "
            f"of {', '.join(registry.FAMILIES)}. Choose another model."
        )
    return registry.FAMILIES[name]


def _layout(family: str) -> Layout:
    layout: Layout = registry.load(family).LAYOUT
    return layout


def _read_index(file: Path, path: str) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(
            f"model.path = {path}: its model_index.json cannot be read ({one_line(error)}). "
            f"Download the model again."
        ) from error


def _download_index(path: str, revision: str | None) -> Path:
    """Return model_index.json of the hub id `path`, in a folder named after the commit."""
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(path, revision=revision, allow_patterns=["model_index.json"])
    except (OSError, ValueError) as error:  # the hub's errors are both
        raise ModelError(
            f"model.path = {path!r}: no such local folder, and the hub did not deliver it "
            f"({one_line(error, 200)}). {_WAYS}"
        ) from error
    index = Path(folder) / "model_index.json"
    if not index.is_file():
        raise ModelError(f"model.path = {path!r}: has no model_index.json on the hub. {_WAYS}")
    return index

"""Where a model's files are and whether they are a model, found out without torch.

So `sdbatch run` can reject a wrong path, a model of another kind or a hostile pickle before it
starts or writes anything. Loading does not rely on it: it reads pickles with weights_only.
"""

import hashlib
import json
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from sdbatch import registry
from sdbatch.engine.limits import LEAST_LANES
from sdbatch.errors import ModelError, one_line
from sdbatch.job import Model, Safety
from sdbatch.job.files import FileKey, named_files, with_paths
from sdbatch.models import extra_files, hub, identify, model_folder, single_file
from sdbatch.models.file_hash import file_sha256
from sdbatch.models.headers import read_header
from sdbatch.registry import EMBEDDED_MODEL

BUILTIN = Path(__file__).parent.parent / "builtin"  # a folder for each model in the package
CHECKER = "safety_checker"  # its folder in a model's folder
OWN_CHECKER = "own"  # of ModelFiles.checker: the one in the model's own folder
_WAYS = "Give a hub id, a folder in diffusers' layout, or one .safetensors or .ckpt file."
Configs = Mapping[str, dict[str, Any]]  # part -> its config.json


def _any_base(configs: Configs) -> str:
    return ""


@dataclass(frozen=True)
class Layout:
    """The files of a family's models. Its folder has them as LAYOUT."""

    weights: tuple[str, ...]  # folders of a model in diffusers' layout that hold weights
    configs: tuple[str, ...]  # folders that hold only configurations
    base: str = ""  # what identify calls a single file of the family; "": it has none
    # From the configurations of the weights to what identify calls files that fit them. Raises
    # ValueError, with what the model is, if the family cannot draw with it.
    base_of: Callable[[Configs], str] = _any_base
    # By the use of the models that the family loads: the lanes of a guided image.
    image_lanes: Mapping[str, int] = field(
        default_factory=lambda: {identify.TEXT_TO_IMAGE: LEAST_LANES}
    )
    use_of: Callable[[Configs], str] = _any_base  # of a model, by its configurations


@dataclass(frozen=True)
class ModelFiles:
    """A model that was found: all that loading needs."""

    kind: Literal["builtin", "folder", "file", "hub"]
    path: str  # builtin: as the job names it, as each machine has its own package; hub: its id
    family: str  # module of its family
    settings: Model  # the job's, with absolute paths, commits and what its files say of themselves
    checker: str | None = None  # a folder, OWN_CHECKER or None
    expected_sha256: str | None = None  # of the files on the driver's machine
    variants: Mapping[str, str | None] = field(default_factory=dict)  # part -> its weights' variant
    scheduler: str = ""  # the class that its model_index.json names
    use: str = identify.TEXT_TO_IMAGE  # what else than text its input is for: see identify.USES

    @property
    def root(self) -> str:
        """Return where diffusers and transformers load it from."""
        return package_path(self.path) if self.kind == "builtin" else self.path

    @property
    def config(self) -> str:
        """Return where the configuration of a single file is loaded from."""
        return package_path(self.settings.config)

    @property
    def revision(self) -> str | None:
        """Return the commit of a hub id."""
        return self.settings.revision

    @property
    def image_lanes(self) -> int:
        """Return the lanes of a guided image."""
        return self.layout.image_lanes[self.use]

    @property
    def layout(self) -> Layout:
        """Return the layout of its family."""
        return _layout(self.family)


def package_path(path: str) -> str:
    """Return where a path is on this machine: builtin: stands for the package's folder."""
    return str(BUILTIN / path.removeprefix("builtin:")) if path.startswith("builtin:") else path


def find_model(settings: Model, safety: Safety) -> ModelFiles:
    """Find the model that a job names, and its safety checker.

    Raises:
        ModelError: there is none, no family loads it, a file that goes with it is missing or of
            another kind, or a pickle holds code.
    """
    safety = with_paths(safety, partial(extra_files.checked, base=""), "safety")
    checker = None if safety.checker in ("auto", "none") else safety.checker
    _refuse_options_of_other_kinds(settings)
    files, base = _find(settings)
    if safety.checker == "auto" and CHECKER in files.variants:
        checker = OWN_CHECKER
    checked = with_paths(files.settings, partial(extra_files.checked, base=base), "model")
    _check_entries(checked)
    files = replace(files, settings=checked, checker=checker)
    if files.kind == "builtin":
        return replace(files, expected_sha256=sha256(files))
    return files


def _find(settings: Model) -> tuple[ModelFiles, str]:
    """Return the model's own files, and what identify calls files that fit it."""
    path = settings.path
    local = Path(path)
    if not local.exists() and not path.startswith("builtin:"):
        return _find_on_hub(settings)
    if settings.revision is not None:
        raise ModelError(
            f"model.revision = {settings.revision!r}: only a hub id has one. Leave it out."
        )
    if path.startswith("builtin:"):
        if path != EMBEDDED_MODEL:
            raise ModelError(f"model.path = {path!r}: the only embedded model is {EMBEDDED_MODEL}.")
        files = ModelFiles("builtin", path, "", settings)
        return _find_folder(files, Path(files.root))
    if local.is_dir():
        return _find_folder(ModelFiles("folder", str(local.resolve()), "", settings), local)
    return _find_file(settings, local)


def _find_folder(files: ModelFiles, root: Path) -> tuple[ModelFiles, str]:
    """Return the files of a model in diffusers' layout here."""
    if not (root / "model_index.json").is_file():
        raise ModelError(f"model.path = {root}: has no model_index.json. {_WAYS}")
    index = _read_json(root, "model_index.json", str(root))
    names = model_folder.files_below(root)
    found, base = _with_parts(files, index, names, root)
    for name in _loaded_weights(found, names):
        read_header(root / name, "model.path")
    return found, base


def _with_parts(
    files: ModelFiles, index: dict[str, Any], names: list[str], root: Path
) -> tuple[ModelFiles, str]:
    """Return the files with family and variants; `names` are those of the model at `root`."""
    path = files.root
    family = _family_of(index, path)
    layout = _layout(family)
    folders = {name.partition("/")[0] for name in names if "/" in name}
    for part in (*layout.weights, *layout.configs):
        if part not in folders:
            raise ModelError(f"model.path = {path}: has no folder {part}/. {_WAYS}")
        if part in layout.weights and f"{part}/config.json" not in names:
            raise ModelError(f"model.path = {path}: has no {part}/config.json. {_WAYS}")
    if "tokenizer" in layout.configs:
        model_folder.check_tokenizer(names, path)
    given = files.settings.variant
    variants = model_folder.choose_variants(names, layout.weights, given, path)
    variant = model_folder.main_variant(variants) or given
    listed = files.kind == "folder" or (index.get(CHECKER) or [None])[0] is not None
    if listed and f"{CHECKER}/config.json" in names:
        own = model_folder.variants(names, CHECKER)
        variants[CHECKER] = variant if variant in own else None
    base, use = _read_configs(layout, root, path)
    found = replace(
        files,
        family=family,
        settings=files.settings.updated(variant=variant),
        variants=variants,
        scheduler=str((index.get("scheduler") or [""])[-1]),
        use=use,
    )
    return found, base


def _read_configs(layout: Layout, root: Path, path: str) -> tuple[str, str]:
    """Return the base and the use of a model, by the configurations of its weights."""
    configs = {part: _read_json(root, f"{part}/config.json", path) for part in layout.weights}
    try:
        return layout.base_of(configs), layout.use_of(configs)
    except ValueError as error:
        raise ModelError(f"model.path = {path}: {error}. Choose another model.") from error


def _find_on_hub(settings: Model) -> tuple[ModelFiles, str]:
    path = settings.path
    on_hub = hub.parse(path)
    if on_hub is None or on_hub.file is not None or on_hub.revision is not None:
        raise ModelError(f"model.path = {path!r}: no such file or folder. {_WAYS}")
    on_hub = replace(on_hub, revision=settings.revision)
    folder = hub.download(on_hub, ["model_index.json", "*/config.json"], "model.path")
    if not (folder / "model_index.json").is_file():
        raise ModelError(f"model.path = {path!r}: has no model_index.json on the hub. {_WAYS}")
    index = _read_json(folder, "model_index.json", path)
    settings = settings.updated(revision=folder.name)
    names = hub.file_names(on_hub, folder)
    return _with_parts(ModelFiles("hub", path, "", settings), index, names, folder)


def _find_file(settings: Model, file: Path) -> tuple[ModelFiles, str]:
    """Return the files of a model in one file, with what it says of itself."""
    if file.suffix not in (".safetensors", ".ckpt"):
        raise ModelError(f"model.path = {file}: must end in .safetensors or .ckpt. {_WAYS}")
    header = read_header(file, "model.path")
    kind = identify.identify(header)
    for family in dict.fromkeys(registry.FAMILIES.values()):
        layout = _layout(family)
        fits = kind.base and kind.base == layout.base and kind.use in layout.image_lanes
        if kind.role == identify.CHECKPOINT and fits:
            single_file.check_parts(header, settings, str(file))
            settings = single_file.adopt_training(header, settings, str(file))
            files = ModelFiles("file", str(file.resolve()), family, settings, use=kind.use)
            if _is_here(files):
                _read_configs(layout, Path(files.config), settings.config)
                unet = _read_json(Path(files.config), "unet/config.json", settings.config)
                single_file.check_architecture(header, unet, str(file))
            return files, layout.base
    raise ModelError(single_file.refusal(kind, str(file)))


def _is_here(files: ModelFiles) -> bool:
    """Return whether the configuration of a single file is a folder here, and not a hub id.

    Raises:
        ModelError: it is neither, or lacks a part.
    """
    root, given = Path(files.config), files.settings.config
    way = (
        f"must be a hub id or a folder in diffusers' layout. Leave it out for "
        f"{files.layout.base}'s."
    )
    if not root.is_dir():
        if given.startswith("builtin:") or hub.parse(given) is None:
            raise ModelError(f"model.config = {given!r}: no such folder: {way}")
        return False
    for part in files.layout.weights:
        if not (root / part / "config.json").is_file():
            raise ModelError(f"model.config = {given!r}: has no {part}/config.json: {way}")
    return True


def _check_entries(settings: Model) -> None:
    """Compare what the job says of its LoRAs and embeddings with their files.

    Raises:
        ModelError: a DoRA has a name, or an embedding's word is not one of several in its file.
    """
    for file in named_files(settings, "model"):
        key = file.key.removesuffix(".path")
        number = key.rpartition(".")[2]
        if file.kind.content == identify.LORA and settings.loras[int(number)].name is not None:
            header = extra_files.header_of(file.path, file.kind, file.key)
            if identify.identify(header).network == identify.DORA:
                raise ModelError(
                    f"{key}.name = {settings.loras[int(number)].name!r}: {file.path} is a DoRA, "
                    f"which cannot be chosen by row. Fuse it: leave out its name."
                )
        if file.kind.content == identify.EMBEDDING:
            token = settings.embeddings[int(number)].token
            words = identify.embedding_words(extra_files.header_of(file.path, file.kind, file.key))
            extra_files.check_words(words, token, key, file.path)


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
        loaded += [Path(files.path), *sorted(_configs(Path(files.config), files.layout))]
    return loaded


def _folder_files(files: ModelFiles) -> Iterator[Path]:
    root = Path(files.root)
    yield from _configs(root, files.layout)
    if files.checker == OWN_CHECKER:
        yield root / CHECKER / "config.json"
    for name in _loaded_weights(files, model_folder.files_below(root)):
        if files.checker == OWN_CHECKER or not name.startswith(f"{CHECKER}/"):
            yield root / name


def _loaded_weights(files: ModelFiles, names: list[str]) -> list[str]:
    return [
        name
        for part, variant in files.variants.items()
        for name in model_folder.weights(names, part, variant)
    ]


def _extra_files(files: ModelFiles) -> Iterator[Path]:
    """Yield the files that are loaded from elsewhere: parts of the model, then what is fused."""
    extras = [file for file in named_files(files.settings, "model") if not file.kind.elsewhere]
    if files.checker not in (None, OWN_CHECKER):
        yield from extra_files.hashed(str(files.checker), FileKey())
    for file in extras:
        yield from extra_files.hashed(file.path, file.kind)


def _configs(root: Path, layout: Layout) -> Iterator[Path]:
    """Yield a folder's configurations and the tokenizer's files; none if it is a hub id."""
    for part in (*layout.configs, *layout.weights):
        for pattern in ("*.json", "*.txt", "*.gz"):
            yield from (root / part).glob(pattern)


def _refuse_options_of_other_kinds(settings: Model) -> None:
    file = Path(settings.path).is_file()
    if settings.variant is not None and (settings.path.startswith("builtin:") or file):
        raise ModelError(
            f"model.variant = {settings.variant!r}: only a folder or hub id has variants. "
            f"Leave it out."
        )
    if not settings.ema and not file:
        raise ModelError("model.ema = False: only a single file can hold both. Leave it out.")


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


def _read_json(root: Path, name: str, path: str) -> dict[str, Any]:
    try:
        return dict(json.loads((root / name).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(
            f"model.path = {path}: its {name} cannot be read ({one_line(error)}). "
            f"Download the model again."
        ) from error

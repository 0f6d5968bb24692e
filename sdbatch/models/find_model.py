"""Where a model's files are and whether they are a model, found out without torch.

So that `sdbatch run` can refuse a wrong path or a hostile pickle before anything is started or
written. Loading (loading.py) trusts nothing of this: it reads pickles with weights_only.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from sdbatch.errors import ModelError
from sdbatch.models import pickles

BUILTIN = Path(__file__).parent.parent / "builtin"  # a folder for each model in the package
SHAPES = "builtin:shapes"
PARTS = ("text_encoder", "unet", "vae")
CHECKER = "safety_checker"
AUTO, OWN = "auto", "own"  # of Extras.checker: OWN is the one in the model's own folder
_FIRST_UNET_KEY = "model.diffusion_model.input_blocks.0.0.weight"  # of the original layout
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_WAYS = "Give a hub id, a folder in diffusers' layout, or one .safetensors or .ckpt file."


@dataclass(frozen=True)
class Extras:
    """What a job says of its model beside where it is."""

    variant: str | None = None  # of a folder's or hub id's weights, such as fp16
    ema: bool = True  # of a single file that holds both: the averaged weights
    prediction_type: str | None = None  # None: as the model's configuration says
    zero_snr: bool | None = None  # the same
    vae: str | None = None  # a folder or a .safetensors file
    loras: tuple[tuple[str, float], ...] = ()  # file, weight
    embeddings: tuple[tuple[str, str], ...] = ()  # file, word
    checker: str | None = AUTO  # a folder, OWN (the model's own), or None


@dataclass(frozen=True)
class ModelFiles:
    """A model that was found; what loading needs to know of it."""

    kind: Literal["builtin", "folder", "file", "hub"]
    path: str  # builtin: as the job names it, as each machine has its own package; hub: its id
    revision: str | None  # hub: the commit
    config: str  # file: hub id or folder of its configuration
    extras: Extras = Extras(checker=None)  # files with whole paths, nothing automatic left
    same: str | None = None  # builtin: the sha256 that each machine's own files must have

    @property
    def root(self) -> str:
        """What diffusers and transformers load it from."""
        if self.kind == "builtin":
            return str(BUILTIN / self.path.removeprefix("builtin:"))
        return self.path


def find(path: str, revision: str | None, config: str, extras: Extras = Extras()) -> ModelFiles:
    """Find the model that a job names.

    Raises:
        ModelError: there is none, it is not a Stable Diffusion model, a file beside it is missing,
            or a pickle holds code.
    """
    extras = _found(extras)
    own = None if extras.checker == AUTO else extras.checker
    _refuse_for_kind(path, extras)
    if path.startswith("builtin:"):
        if path != SHAPES:
            raise ModelError(f"model.path = {path!r}: the only model built in is {SHAPES}.")
        files = ModelFiles("builtin", path, None, config, replace(extras, checker=own))
        _check_folder(Path(files.root))
        return replace(files, same=sha256(files))
    local = Path(path)
    if Path(config).exists():
        config = str(Path(config).resolve())  # an actor may stand in another folder
    if local.exists():
        if revision is not None:
            raise ModelError(f"model.revision = {revision!r}: only a hub id has one. Leave it out.")
        if local.is_dir():
            _check_folder(local)
            if extras.checker == AUTO and (local / CHECKER / "config.json").is_file():
                own = OWN
            extras = replace(extras, variant=_variant(local, extras.variant), checker=own)
            return ModelFiles("folder", str(local.resolve()), None, config, extras)
        _check_file(local)
        return ModelFiles("file", str(local.resolve()), None, config, replace(extras, checker=own))
    if not _HUB_ID.fullmatch(path) or path.startswith("."):
        raise ModelError(f"model.path = {path!r}: no such file or folder. {_WAYS}")
    index = _index(path, revision)
    if extras.checker == AUTO and (json.loads(index.read_text()).get(CHECKER) or [None])[0]:
        own = OWN
    return ModelFiles("hub", path, index.parent.name, config, replace(extras, checker=own))


def sha256(files: ModelFiles) -> str | None:
    """Return the hash of the files that are loaded; None where the name and commit say it all.

    Raises:
        ModelError: a file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        for file in (loaded := hashed(files)):
            with file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
    except OSError as error:
        raise ModelError(
            f"model.path = {files.path}: cannot be read ({error}). Mend the copy."
        ) from error
    return digest.hexdigest() if loaded else None


def hashed(files: ModelFiles) -> list[Path]:
    """Return the files whose hash names the model, where the name and commit do not say it all."""
    loaded = list(_beside(files.extras))
    if files.kind in ("builtin", "folder"):
        loaded += sorted(_loaded(Path(files.root), files.extras))
    elif files.kind == "file":
        loaded += [Path(files.path), *sorted(_configs(Path(files.config)))]
    return loaded


def _loaded(root: Path, extras: Extras) -> Iterator[Path]:
    yield from _configs(root)
    for part in PARTS:
        yield from _weights(root / part, extras.variant)
    if extras.checker == OWN:
        yield root / CHECKER / "config.json"
        yield from _weights(root / CHECKER, _checker_variant(root, extras.variant))


def _beside(extras: Extras) -> Iterator[Path]:
    """Yield the files that are loaded from elsewhere, in the order in which they are fused."""
    folders = [extras.vae, None if extras.checker == OWN else extras.checker]
    for folder in (Path(given) for given in folders if given):
        if folder.is_file():
            yield folder
        else:
            yield from sorted([*folder.glob("*.json"), *_weights(folder, None)])
    for file, _ in (*extras.loras, *extras.embeddings):
        yield Path(file)


def _weights(folder: Path, variant: str | None) -> list[Path]:
    """Return the files of weights of one part that diffusers would load."""
    return [file for file in _every_weights(folder) if _variant_of(file) == (variant or "")]


def _every_weights(folder: Path) -> list[Path]:
    return [*folder.glob("*.safetensors")] or [*folder.glob("*.bin")]


def _variant_of(file: Path) -> str:
    return file.stem.partition(".")[2]  # of diffusion_pytorch_model.fp16.safetensors: fp16


def _variant(root: Path, asked: str | None) -> str | None:
    """Return the variant to load: the one asked for, none, or the only one that there is."""
    every = set.intersection(*(_variants(root / part) for part in PARTS))
    if asked is None and "" in every:
        return None
    if asked in every:
        return asked
    only = sorted(every)
    if asked is None and len(only) == 1:
        return only[0]
    raise ModelError(
        f"model.variant = {asked!r}: all parts of {root} have "
        f"{', '.join(v or 'plain weights' for v in only) or 'no variant in common'}. "
        f"Set model.variant to one of these, or leave it out."
    )


def checker_variant(files: ModelFiles) -> str | None:
    """Return the variant of the model's own checker: plain weights where it has no other."""
    variant = files.extras.variant
    return variant if files.kind == "hub" else _checker_variant(Path(files.path), variant)


def _checker_variant(root: Path, variant: str | None) -> str | None:
    return variant if variant in _variants(root / CHECKER) else None


def _variants(folder: Path) -> set[str]:
    return {_variant_of(file) for file in _every_weights(folder)}


def _found(extras: Extras) -> Extras:
    """Return `extras` with whole paths.

    Raises:
        ModelError: a file is missing, or is not what it is named for.
    """
    loras, embeddings = [], []
    for number, (path, weight) in enumerate(extras.loras):
        where = f"model.loras.{number}.path"
        file = _file(path, where, (".safetensors",))
        if not any("lora" in name.lower() for name in pickles.names(file, where)):
            raise ModelError(f"{where} = {path!r}: holds no LoRA. Give a LoRA's file.")
        loras.append((str(file), weight))
    for number, (path, token) in enumerate(extras.embeddings):
        where = f"model.embeddings.{number}.path"
        file = _file(path, where, (".safetensors", ".pt", ".bin"))
        pickles.names(file, where)
        embeddings.append((str(file), token))
    vae, checker = extras.vae, extras.checker
    if vae is not None:
        if Path(vae).is_dir():
            vae = _part(vae, "model.vae")
        else:
            vae = str(_file(vae, "model.vae", (".safetensors",)))
            pickles.names(Path(vae), "model.vae")
    if checker not in (None, AUTO):
        checker = _part(checker, "safety.checker")
    return replace(
        extras, vae=vae, loras=tuple(loras), embeddings=tuple(embeddings), checker=checker
    )


def _file(path: str, where: str, suffixes: tuple[str, ...]) -> Path:
    file = Path(path)
    if not file.is_file() or file.suffix not in suffixes:
        raise ModelError(
            f"{where} = {path!r}: must be a file here that ends in {', '.join(suffixes)}. "
            f"Fetch it first; a hub id will not do."
        )
    return file.resolve()


def _part(path: str, where: str) -> str:
    folder = Path(path)
    if not (folder / "config.json").is_file() or not _weights(folder, None):
        raise ModelError(
            f"{where} = {path!r}: must be a folder here with config.json and weights. "
            f"Fetch it first; a hub id will not do."
        )
    return str(folder.resolve())


def _configs(root: Path) -> Iterator[Path]:
    """Yield a folder's configurations and the tokenizer's files; none where it is a hub id."""
    for part in ("tokenizer", "scheduler", *PARTS):
        yield from (root / part).glob("*.json")
        yield from (root / part).glob("*.txt")


def _refuse_for_kind(path: str, extras: Extras) -> None:
    """Refuse what only another kind of model has."""
    if extras.variant is not None and (path.startswith("builtin:") or Path(path).is_file()):
        raise ModelError(
            f"model.variant = {extras.variant!r}: only a folder or hub id has one. Leave it out."
        )
    if not extras.ema and not Path(path).is_file():
        raise ModelError("model.ema = False: only a single file can hold both. Leave it out.")


def _check_folder(root: Path) -> None:
    if not (root / "model_index.json").is_file():
        raise ModelError(f"model.path = {root}: has no model_index.json. {_WAYS}")
    for part in (*PARTS, "tokenizer", "scheduler"):
        if not (root / part).is_dir():
            raise ModelError(f"model.path = {root}: has no folder {part}/. {_WAYS}")
        if part in PARTS and not (root / part / "config.json").is_file():
            raise ModelError(f"model.path = {root}: has no {part}/config.json. {_WAYS}")
    for part in PARTS:
        if not _every_weights(root / part):
            raise ModelError(
                f"model.path = {root}: has no weights in {part}/. Fetch the model whole."
            )


def _check_file(file: Path) -> None:
    if file.suffix not in (".safetensors", ".ckpt"):
        raise ModelError(f"model.path = {file}: must end in .safetensors or .ckpt. {_WAYS}")
    if _FIRST_UNET_KEY not in pickles.names(file, "model.path"):
        raise ModelError(f"model.path = {file}: holds no Stable Diffusion UNet. {_WAYS}")


def _index(path: str, revision: str | None) -> Path:
    """Return model_index.json of the hub id `path`, in a folder named for the commit."""
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(path, revision=revision, allow_patterns=["model_index.json"])
    except (OSError, ValueError) as error:  # the hub's errors are both
        text = " ".join(str(error).split())[:200]
        raise ModelError(
            f"model.path = {path!r}: no such folder here, and the hub gave none ({text}). {_WAYS}"
        ) from error
    index = Path(folder) / "model_index.json"
    if not index.is_file():
        raise ModelError(f"model.path = {path!r}: has no model_index.json on the hub. {_WAYS}")
    return index

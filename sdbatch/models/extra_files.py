"""The files that a job names besides its model: LoRAs, embeddings, VAEs, checkers.

A file is here, or on the hub. `checked` runs on the driver before anything starts; `local` finds
the same files on a machine that loads them.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath

from sdbatch.errors import ModelError
from sdbatch.job.files import FileKey, NamedFile
from sdbatch.models import hub, identify, model_folder
from sdbatch.models.headers import Header, read_header
from sdbatch.models.identify import Kind

# The file of weights in a folder or repository that is named without one, the first that is there.
_USUAL: Mapping[str, tuple[str, ...]] = {
    identify.LORA: (
        "pytorch_lora_weights.safetensors",
        "adapter_model.safetensors",
        "pytorch_lora_weights.bin",
        "adapter_model.bin",
    ),
    identify.EMBEDDING: ("learned_embeds.safetensors", "learned_embeds.bin"),
}
_KEYS = {  # where a file of each kind belongs
    identify.CHECKPOINT: "It belongs into model.path.",
    identify.LORA: "It belongs into model.loras.",
    identify.EMBEDDING: "It belongs into model.embeddings.",
    identify.VAE: "It belongs into model.vae.",
}


def checked(file: NamedFile, base: str) -> str:
    """Return the absolute path of a file, or its path on the hub with the commit.

    Args:
        file: that a job names.
        base: what model it must fit, such as identify.SD1.

    Raises:
        ModelError: it is missing, or is not what its key needs.
    """
    path, kind = Path(file.path), file.kind
    if kind.elsewhere:
        return str(path.resolve()) if path.exists() else file.path
    on_hub = _on_hub(file.path, kind)
    if on_hub is not None:
        pinned, found = _download(on_hub, kind, file.key)
        _check_content(found, file, base)
        return str(pinned)
    found = _usual_file(path, kind) or path
    _check_content(found, file, base)
    return os.path.abspath(found)  # links as they are: the hub's cache has the config.json by name


def local(path: str, kind: FileKey) -> str:
    """Return where the file of a checked `path` is on this machine.

    Raises:
        ModelError: the hub does not deliver it.
    """
    on_hub = None if kind.elsewhere else _on_hub(path, kind)
    return path if on_hub is None else str(_download(on_hub, kind, path)[1])


def hashed(path: str, kind: FileKey) -> Iterator[Path]:
    """Yield the files of a checked `path` whose hash identifies it; none of the hub's."""
    found = Path(path)
    if found.is_file():
        yield from (found, *kind.companions_of(found))
    elif found.is_dir():
        yield from sorted([*found.glob("*.json"), *folder_weights(found)])


def is_usual(name: str) -> bool:
    """Return whether a file has the name that a library gives every file of its kind."""
    return any(name in names for names in _USUAL.values())


def folder_weights(folder: Path) -> list[Path]:
    """Return the weights in the folder of one part, in the variant that is loaded."""
    names = model_folder.files_below(folder)
    return [folder / name for name in model_folder.weights(names, "", folder_variant(folder))]


def folder_variant(folder: Path) -> str | None:
    """Return the variant of the weights in the folder of one part: plain, or the only one."""
    found = sorted(model_folder.variants(model_folder.files_below(folder), ""))
    return found[0] or None if "" in found or len(found) == 1 else None


def _on_hub(path: str, kind: FileKey) -> hub.HubPath | None:
    """Return what a path names on the hub; None if it is a local file, here or missing."""
    if not kind.may_be_elsewhere(path) or Path(path).exists():
        return None
    return hub.parse(path)


def _download(path: hub.HubPath, kind: FileKey, where: str) -> tuple[hub.HubPath, Path]:
    """Return the path with its commit, and its file or folder on this machine."""
    usual = _USUAL.get(kind.content, ("diffusion_pytorch_model.*",))
    names = usual if path.file is None else (path.file,)
    for name in names:
        next_to_it = [str(PurePosixPath(name).with_name(each)) for each in kind.companions]
        folder = hub.download(path, [name, *next_to_it, "config.json"], where)
        pinned = replace(path, revision=folder.name)
        if path.file is None and kind.content == identify.VAE:
            return pinned, folder
        if (folder / name).is_file():
            return pinned, folder / name
    if path.file is None:
        raise ModelError(
            f"{where} = {str(path)!r}: its repository has none of {', '.join(names)}: must name "
            f"the file. Write {path}/FILE{kind.suffixes[0]}."
        )
    raise ModelError(
        f"{where} = {str(path)!r}: its repository has no such file, or is not here whole. Check "
        f"the name; offline, download it first."
    )


def _usual_file(folder: Path, kind: FileKey) -> Path | None:
    names = _USUAL.get(kind.content, ())
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _check_content(path: Path, file: NamedFile, base: str) -> None:
    kind = file.kind
    if path.is_dir() and kind.content == identify.LORA:
        raise ModelError(
            f"{file.key} = {file.path!r}: the folder has none of "
            f"{', '.join(_USUAL[kind.content])}. Name the file."
        )
    if kind.folder and (path.is_dir() or not kind.suffixes):
        loaded = folder_weights(path) if path.is_dir() else []
        if not (path / "config.json").is_file() or not loaded:
            raise ModelError(
                f"{file.key} = {file.path!r}: must be a local folder with config.json and "
                f"weights{', or a hub id' if kind.hub else ''}. {_download_first(kind)}"
            )
        for each in loaded:
            read_header(each, file.key)
        return
    if not path.is_file() or path.suffix not in kind.suffixes:
        raise ModelError(
            f"{file.key} = {file.path!r}: must be a local file that ends in "
            f"{', '.join(kind.suffixes)}{', or a hub id' if kind.hub else ''}. "
            f"{_download_first(kind)}"
        )
    header = read_header(path, file.key)
    if kind.content:
        check_kind(identify.identify(header), file, base)


def _download_first(kind: FileKey) -> str:
    return "Check the path." if kind.hub else "Download it first; a hub id does not work here."


def check_kind(found: Kind, file: NamedFile, base: str) -> None:
    """Raise a ModelError if a file is of another kind than its key needs, or of another model."""
    wanted = file.kind.content
    if found.network and found.network not in identify.NETWORKS and found.role == wanted:
        raise ModelError(
            f"{file.key} = {file.path!r}: is {found.words}: must be one of the kinds "
            f"{', '.join(identify.NETWORKS)}. Merge it into the model with its own tool, or choose "
            f"another file."
        )
    if found.role == wanted and found.base in ("", base):
        return
    way = _KEYS.get(found.role, "") if found.role != wanted else ""
    article = "an" if wanted == identify.EMBEDDING else "a"
    raise ModelError(
        f"{file.key} = {file.path!r}: is {found.words}: must be {article} {wanted} of {base}. "
        f"{way or 'Choose another file.'}"
    )


def check_words(words: list[str], token: str, key: str, path: str) -> None:
    """Raise a ModelError if an embedding's file has several words and `token` is none of them."""
    if len(words) > 1 and token not in words:
        raise ModelError(
            f"{key}.token = {token!r}: {path} holds several words, {', '.join(words[:8])}: must "
            f"be one of them. Name the words in entries of their own."
        )


def header_of(path: str, kind: FileKey, where: str) -> Header:
    """Return the header of a checked file."""
    return read_header(Path(local(path, kind)), where)

"""A model in diffusers' layout, by the names of its files: its parts, weights and variants.

For a folder here and for a repository of the hub alike.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from sdbatch.errors import ModelError

_SHARD = re.compile(r"-(\d{5})-of-(\d{5})")
_OF_TRANSFORMERS, _OF_DIFFUSERS = ("model", "pytorch_model"), ("diffusion_pytorch_model",)


def files_below(root: Path) -> list[str]:
    """Return the names of the files of a folder and of its parts, with slashes."""
    return sorted(
        file.relative_to(root).as_posix()
        for pattern in ("*", "*/*")
        for file in root.glob(pattern)
        if file.is_file()
    )


def variants(names: Iterable[str], part: str) -> set[str]:
    """Return the variants of a part's weights; "" stands for the plain ones."""
    return {_variant(name) for name in _all_weights(names, part)}


def weights(names: Iterable[str], part: str, variant: str | None) -> list[str]:
    """Return the files of weights that diffusers would load: .bin only without .safetensors."""
    own = [name for name in _all_weights(names, part) if _variant(name) == (variant or "")]
    return [name for name in own if name.endswith(".safetensors")] or own


def choose_variants(
    names: Collection[str], parts: Iterable[str], given: str | None, path: str
) -> dict[str, str | None]:
    """Return the variant of each part: the given one, none, or the only one that there is.

    A part without that variant has its plain weights, as diffusers loads it.

    Raises:
        ModelError: a part has no such weights, or some of a part's files are missing.
    """
    have = {part: variants(names, part) for part in parts}
    for part, own in have.items():
        if not own:
            raise ModelError(
                f"model.path = {path}: has no weights in {part}/. Download the whole model."
            )
    possible = sorted(
        name
        for name in set.union(*have.values())
        if all(name in own or "" in own for own in have.values())
    )
    wanted = given or ""
    if wanted not in possible and (given is not None or len(possible) != 1):
        raise ModelError(
            f"model.variant = {given!r}: all parts of {path} have "
            f"{', '.join(name or 'plain weights' for name in possible) or 'no variant in common'}. "
            f"Set model.variant to one of these, or leave it out."
        )
    chosen = wanted if wanted in possible else possible[0]
    found = {part: (chosen if chosen in own else "") or None for part, own in have.items()}
    for part, variant in found.items():
        _check_shards(weights(names, part, variant), path)
    return found


def main_variant(chosen: Mapping[str, str | None]) -> str | None:
    """Return the variant that a job records for its model."""
    return next((variant for variant in chosen.values() if variant is not None), None)


def check_tokenizer(names: Collection[str], path: str) -> None:
    """Raise a ModelError if a tokenizer lacks its vocabulary, which would then be made up."""
    files = {name.removeprefix("tokenizer/") for name in names if name.startswith("tokenizer/")}
    if "tokenizer.json" not in files and not {"vocab.json", "merges.txt"} <= files:
        raise ModelError(
            f"model.path = {path}: its tokenizer/ has no vocabulary: must have vocab.json and "
            f"merges.txt, or tokenizer.json. Download the whole model."
        )


def _all_weights(names: Iterable[str], part: str) -> list[str]:
    """Return the weights of a part in files that diffusers and transformers look for."""
    found = []
    for name in names:
        folder, _, file = name.rpartition("/")
        stem = _SHARD.sub("", file.partition(".")[0])
        known = (*_OF_DIFFUSERS, *_OF_TRANSFORMERS)
        if folder == part and file.endswith((".safetensors", ".bin")) and stem in known:
            found.append(name)
    return found


def _variant(name: str) -> str:
    """Return the middle of a name: of model.fp16.safetensors and of its shards, fp16."""
    stem = name.rpartition("/")[2].rpartition(".")[0]
    return _SHARD.sub("", stem.partition(".")[2])


def _check_shards(names: list[str], path: str) -> None:
    for name in names:
        if found := _SHARD.search(name):
            count = int(found[2])
            there = {_SHARD.search(each)[1] for each in names if _SHARD.search(each)}  # type: ignore[index]
            missing = [n for n in range(1, count + 1) if f"{n:05}" not in there]
            if missing:
                raise ModelError(
                    f"model.path = {path}: of the {count} files of {name} number "
                    f"{missing[0]} is missing. Download the whole model."
                )
            return

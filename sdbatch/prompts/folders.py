"""What of a folder or a glob is a table, and what is left, with the reason.

Folders of table formats whose log or state says which files count are refused, or read by it.
"""

import json
import posixpath
import re
from dataclasses import dataclass
from typing import Any

from sdbatch.errors import PromptTableError
from sdbatch.job import Reader
from sdbatch.prompts.caption_files import SUFFIX, captions_in, is_picture
from sdbatch.prompts.formats import kind_by_name

_LEFT_SHOWN = 3  # files of a folder that are left for one reason; more are counted
_TABLE_FORMATS = {  # whose files may be removed or replaced in a log: a pattern, and its name
    re.compile(r"(^|/)_delta_log/"): ("a Delta table", "delta_scan"),
    re.compile(r"(^|/)metadata/[^/]*\.metadata\.json$"): ("an Iceberg table", "iceberg_scan"),
    re.compile(r"(^|/)\.hoodie/"): ("a Hudi table", "read_parquet"),
}
_DOCUMENT = re.compile(
    r"(readme|licen[cs]e|copying|notice|changelog|authors|citation|contributing|requirements)"
    r"([ ._-].*)?",
    re.IGNORECASE,
)
_METADATA = (
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
    "_metadata",
    "_common_metadata",
)
_SPLIT = re.compile(
    r"(?:^|[/._-])(train|training|test|testing|valid|validation|val|dev|eval|evaluation)"
    r"(?=[/._-])",
    re.IGNORECASE,
)
_SAME_SPLIT = {"training": "train", "testing": "test", "evaluation": "eval"}
_VALIDATION = ("valid", "val", "dev")
_OURS = ("job.yaml", "plan.parquet")  # in an output of sdbatch


@dataclass
class Folder:
    """The files of a folder or a glob, by their paths."""

    taken: list[str]
    left: dict[str, str]  # path -> why

    @classmethod
    def of_glob(cls, paths: list[str], reader: Reader) -> "Folder":
        """Sort what a glob finds: what it names is taken unless it cannot be a table."""
        folder = cls([], {})
        for path in paths:
            reason = _reason_to_leave(posixpath.basename(path), reader)
            if reason is None:
                folder.taken.append(path)
            else:
                folder.left[path] = reason
        return folder


def sort_folder(path: str, fs: Any, names: list[str], reader: Reader) -> Folder:
    """Sort the files of a folder.

    Args:
        path: of the folder, as the job has it.
        fs: its filesystem.
        names: of its files, below the folder.
        reader: how files are read, where they do not say it themselves.

    Raises:
        PromptTableError: it is a table that needs its own reader, or holds several splits.
    """
    root = fs._strip_protocol(path).rstrip("/")
    names = [name.lstrip("/") for name in names]
    _check_table_format(path, names)
    folder = Folder([], {})
    saved = _saved_files(fs, root, names)
    for parent in sorted({posixpath.dirname(name) for name in names}):
        _sort_one(folder, parent, [n for n in names if posixpath.dirname(n) == parent], reader)
    for name in [name for name in folder.taken if posixpath.dirname(name) in saved]:
        if posixpath.basename(name) not in saved[posixpath.dirname(name)]:
            folder.taken.remove(name)
            folder.left[name] = "not in state.json"
    _check_splits(path, folder.taken)
    return Folder(
        [f"{root}/{name}" for name in folder.taken],
        {f"{root}/{name}": reason for name, reason in folder.left.items()},
    )


def _sort_one(folder: Folder, parent: str, names: list[str], reader: Reader) -> None:
    """Sort the files of one folder, those in its subfolders excepted."""
    found = [name for name in names if _reason_to_leave(name, reader) is None]
    texts = [name for name in found if name.lower().endswith(SUFFIX)]
    are_captions = reader.format == "captions"
    captions = captions_in(names) if reader.format in (None, "captions") else []
    if captions or (are_captions and texts):
        folder.taken.append(posixpath.join(parent, f"*{SUFFIX}"))
    for name in names:
        reason = _reason_to_leave(name, reader)
        if captions and name in texts:
            if name not in captions:
                folder.left[name] = "no picture of its name, as the other captions have"
        elif are_captions and name in texts:
            continue
        elif are_captions and reason is None:
            folder.left[name] = "not a caption"
        elif reason is None:
            folder.taken.append(name)
        else:
            folder.left[name] = reason


def _reason_to_leave(name: str, reader: Reader) -> str | None:
    """Return why a file that only its folder names is not read; None: it is."""
    parts = name.split("/")
    if any(part.startswith((".", "_")) for part in parts if "=" not in part):
        return "hidden"
    if parts[-1] in _METADATA:
        return "about the table, not of it"
    if is_picture(name):
        return "a picture"
    kind = kind_by_name(name)
    if _DOCUMENT.fullmatch(parts[-1]) and (kind is None or kind.format == "txt"):
        return "a document"
    return "unknown suffix" if kind is None and reader.format is None else None


def _check_table_format(path: str, names: list[str]) -> None:
    for pattern, (table, scan) in _TABLE_FORMATS.items():
        if any(map(pattern.search, names)):
            raise PromptTableError(
                f"prompts.path = {path}: {table}, whose log says which files count: must be plain "
                f"files. Write its rows to a file, such as with DuckDB: COPY (FROM "
                f"{scan}('{path}')) TO 'prompts.parquet'."
            )
    if {*_OURS} <= {*names}:
        raise PromptTableError(
            f"prompts.path = {path}: an output of sdbatch: must be a table. Its rows are in its "
            f"folder data/."
        )


def _saved_files(fs: Any, root: str, names: list[str]) -> dict[str, set[str]]:
    """Return the files of each folder that Hugging Face's save_to_disk wrote, by its state.json."""
    saved = {}
    for name in names:
        if posixpath.basename(name) == "state.json":
            try:
                state = json.loads(fs.cat_file(f"{root}/{name}"))
                files = {each["filename"] for each in state["_data_files"]}
            except (ValueError, KeyError, TypeError):
                continue  # of another tool
            saved[posixpath.dirname(name)] = files
    return saved


def _check_splits(path: str, names: list[str]) -> None:
    splits: dict[str, list[str]] = {}
    for name in names:
        if (match := _SPLIT.search(name)) is not None:
            found = match[1].lower()
            split = "validation" if found in _VALIDATION else _SAME_SPLIT.get(found, found)
            splits.setdefault(split, []).append(name)
    if len(splits) > 1:
        listed = ", ".join(
            f"{split} ({len(found)} {'file' if len(found) == 1 else 'files'}, such as {found[0]})"
            for split, found in splits.items()
        )
        example = next(iter(splits.values()))[0]
        raise PromptTableError(
            f"prompts.path = {path}: several splits, {listed}: must be one table. Name the one to "
            f"draw, such as {path.rstrip('/')}/{_glob(example)}, or list several paths."
        )


def _glob(name: str) -> str:
    """Return the folder of a split, or a glob of its files."""
    match = _SPLIT.search(name)
    end = match.end() if match else len(name)
    if name[end : end + 1] == "/":
        return name[:end]
    kind = re.sub(r"\d+|-of-", "*", name[end:])
    return name[:end] + re.sub(r"\*[*]+", "*", kind)


def describe_left(left: dict[str, str]) -> list[str]:
    """Return each file that is left with the reason; many of a kind in one line."""
    kinds: dict[tuple[str, str, str], list[str]] = {}
    for name, reason in left.items():
        suffix = posixpath.splitext(name)[1]
        kinds.setdefault((posixpath.dirname(name), suffix, reason), []).append(name)
    lines = []
    for (folder, suffix, reason), names in kinds.items():
        if len(names) > _LEFT_SHOWN:
            pattern = posixpath.join(folder, f"*{suffix}")
            lines.append(f"{pattern}: {reason} ({len(names):,} files)")
        else:
            lines += [f"{name}: {reason}" for name in names]
    return lines

"""What the columns of a prompt table mean: the keys that they set, and those that they seem to set.

A column of our name is used unless the job maps another one or switches it off.
"""

import json
import re
import shlex
from collections.abc import Collection, Iterable, Iterator

import pyarrow as pa

from sdbatch.errors import JobError, PromptTableError, short_repr
from sdbatch.job import COLUMNS, PICTURES, Prompts, Sampling, strict_yaml
from sdbatch.prompts import captions
from sdbatch.prompts.types import is_binary

_TYPES = {name: field.annotation for name, field in Sampling.model_fields.items()}
_NUMBERS = [name for name, kind in _TYPES.items() if kind in (int, float)]
_FLAGS = [name for name, kind in _TYPES.items() if kind is bool]

# Names that a column may have elsewhere, in the form of `_normal`; the likeliest first.
_OTHER_NAMES = {
    "prompt": (
        "prompt",
        "caption",
        "captions",
        "prompts",
        "positiveprompt",
        "text",
        "sentence",
        "sentences",
        "promptstring",
        "prompttext",
        "description",
        "instruction",
    ),
    "negative_prompt": ("negprompt", "promptnegative", "negative", "negativeprompts", "neg"),
    "seed": ("seeds", "randomseed", "noiseseed", "rngseed"),
    "num_inference_steps": (
        "steps",
        "step",
        "numsteps",
        "nsteps",
        "inferencesteps",
        "samplingsteps",
        "samplesteps",
        "ddimsteps",
    ),
    "guidance_scale": ("cfg", "cfgscale", "guidance", "scale", "unconditionalguidancescale"),
    "sampler": (
        "samplername",
        "samplermethod",
        "samplerindex",
        "samplingmethod",
        "scheduler",
        "schedulername",
        "sampletype",
    ),
    "height": ("h", "imageheight", "imgheight", "heightpx"),
    "width": ("w", "imagewidth", "imgwidth", "widthpx"),
    "guidance_rescale": ("cfgrescale", "rescalecfg"),
    "eta": ("ddimeta", "etaddim"),
    "image": ("initimage", "inputimage", "sourceimage", "imagepath", "imageurl", "imagefile"),
    "mask_image": ("mask", "masks", "inpaintmask", "maskpath", "maskurl", "maskfile"),
}
# Names that `datasets` gives the pictures in the metadata of a folder of images.
_FOLDER_NAMES = {
    "image": ("file_name", "image_file_name"),
    "mask_image": ("mask_image_file_name", "mask_file_name"),
}
_MEANINGS = {
    "num_inference_steps": "number of steps",
    "clip_skip": "clip skip, counted from 0",  # AUTOMATIC1111 counts from 1
}


def _normal(name: str) -> str:
    """Return `name` without case, spaces and marks: "CFG scale" is cfgscale."""
    return re.sub("[^a-z0-9]", "", name.casefold())


_KEYS = {_normal(key): key for key in COLUMNS if key != "id"} | {
    other: key for key, others in _OTHER_NAMES.items() for other in others
}


def map_columns(
    prompts: Prompts, present: pa.Schema, *, needs_header: bool = False, metadata: bool = False
) -> dict[str, str]:
    """Return our name -> the table's name, of the columns that are used.

    Args:
        prompts: the job's section.
        present: the table's columns.
        needs_header: whether their names come from the first line of a file.
        metadata: whether the table describes folders of images, as `datasets` reads them.

    Raises:
        PromptTableError: no prompt column, a column that is missing, twice there, or of a type
            that cannot be used.
    """
    if len(set(present.names)) != len(present.names):
        repeated = next(name for name in present.names if present.names.count(name) > 1)
        raise PromptTableError(
            f"column {repeated!r} appears twice in the table: rename one of them."
        )
    columns = {name: name for name in COLUMNS if name != "id" and name in present.names}
    for ours, names in _FOLDER_NAMES.items() if metadata else ():
        for name in names:
            if ours not in columns and name in present.names:
                columns[ours] = name
    for ours, theirs in prompts.columns.items():
        if theirs is None:
            columns.pop(ours, None)
        elif theirs in present.names:
            columns[ours] = theirs
        else:
            raise PromptTableError(
                f"prompts.columns.{ours} = {theirs!r}: not in the table. It has: "
                f"{', '.join(present.names)}."
            )
    if "prompt" not in columns:
        where = "prompts.columns.prompt = null: the table" if "prompt" in prompts.columns else None
        likely = _likely_prompt(present)
        header = " If its first line is a row, name the columns: --set prompts.reader.names=[...]"
        raise PromptTableError(
            f"{where or 'the table'} has no column 'prompt'. It has: {', '.join(present.names)}. "
            f"Name the right one: --set {_set_column('prompt', likely or _first_text(present))}"
            + (header if needs_header and likely is None else "")
        )
    for name, theirs in columns.items():
        _check_type(name, present.field(theirs))
    _check_together(prompts, columns)
    return columns


def _check_together(prompts: Prompts, columns: dict[str, str]) -> None:
    """Raise a PromptTableError if a key of the section and the columns exclude each other."""
    if prompts.size_from_image and "image" not in columns:
        raise PromptTableError(
            "prompts.size_from_image = true: is for a table with a column 'image'. Leave it out, "
            "or name the column: --set prompts.columns.image=NAME"
        )
    if prompts.frames is not None and "mix" in columns:
        raise PromptTableError(
            f"column {columns['mix']!r} = used as mix: must not be, as prompts.frames sets it. "
            f"Turn it off: --set {_set_column('mix', None)}"
        )


def _may_be_prompts(present: pa.Schema) -> list[str]:
    return [f.name for f in present if _is_text(f.type) or captions.are_in(f.type)]


def _likely_prompt(present: pa.Schema) -> str | None:
    """Return the column that holds the prompts by its name; None without one."""
    by_name = {_normal(name): name for name in reversed(_may_be_prompts(present))}
    return next((by_name[name] for name in _OTHER_NAMES["prompt"] if name in by_name), None)


def _first_text(present: pa.Schema) -> str:
    return next(iter([*_may_be_prompts(present), *present.names]), "NAME")


def _set_column(key: str, name: str | None) -> str:
    """Return the value of --set that maps a key to a column, as a shell needs it."""
    return shlex.quote(f"prompts.columns.{key}={_yaml_text(name)}")


def _yaml_text(name: str | None) -> str:
    if name is None:
        return "null"
    try:
        plain = strict_yaml.parse(name, "") == name
    except JobError:
        plain = False
    return name if plain else json.dumps(name, ensure_ascii=False)


def _is_text(kind: pa.DataType) -> bool:
    value_type = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(
        pa.types.is_string(value_type)
        or pa.types.is_large_string(value_type)
        or pa.types.is_string_view(value_type)
    )


def _check_type(ours: str, field: pa.Field) -> None:
    value_type = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    number = (
        pa.types.is_integer(value_type)
        or pa.types.is_floating(value_type)
        or pa.types.is_decimal(value_type)
    )
    if ours in PICTURES:
        _check_pictures(ours, field)
        return
    fits = _is_text(value_type) or pa.types.is_null(value_type)
    fits = fits or (number and ours in (*_NUMBERS, "id", "sampler"))
    fits = fits or (pa.types.is_boolean(value_type) and ours in _FLAGS)
    fits = fits or (ours == "prompt" and captions.are_in(field.type))
    if not fits:  # JSON text, of mixed types, is looked at row by row
        expected = "numbers" if ours in _NUMBERS else "true or false" if ours in _FLAGS else "text"
        expected = "text or numbers" if ours == "id" else expected
        raise PromptTableError(
            f"column {field.name!r} = {field.type}: must hold {expected} to be used as {ours}."
        )


def _check_pictures(ours: str, field: pa.Field) -> None:
    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    parts = {part.name: part.type for part in kind} if pa.types.is_struct(kind) else {}
    as_struct = (
        parts.keys() == {"bytes", "path"}
        and (is_binary(parts["bytes"]) or _is_text(parts["bytes"]))  # text: all of them are null
        and _is_text(parts["path"])
    )
    if not (as_struct or is_binary(kind) or _is_text(kind)):
        raise PromptTableError(
            f"column {field.name!r} = {field.type}: must hold pictures to be used as {ours}: "
            f"binary, text (a path, a URL or a data URI) or struct<bytes: binary, path: string>. "
            f"--set {_set_column(ours, None)} leaves it out."
        )


def select_extras(
    prompts: Prompts, present: pa.Schema, columns: dict[str, str], reserved: Collection[str]
) -> list[pa.Field]:
    """Return the table's own columns that go into the output: those in `keep`, else all unused.

    Raises:
        PromptTableError: one of them is missing, or has the name of another output column.
    """
    if prompts.keep is not None:
        for name in prompts.keep:
            if name not in present.names or prompts.keep.count(name) > 1:
                raise PromptTableError(
                    f"prompts.keep = {name!r}: must be in the table, once. "
                    f"It has: {', '.join(present.names)}."
                )
        names = [*prompts.keep]
    else:
        taken = {name.casefold() for name in reserved}
        used = set(columns.values())
        if columns.get("id", "").casefold() not in taken:
            used.discard(columns.get("id", ""))  # stays an extra, under its own name and type
        off = {ours for ours, theirs in prompts.columns.items() if theirs is None}
        off &= taken.union(PICTURES)
        names = [n for n in present.names if n not in used and n.casefold() not in off]
    if prompts.source is not None and prompts.source not in names:
        names.append(prompts.source)
    _check_names(names, columns, reserved)
    return [present.field(name) for name in names]


def _check_names(extras: list[str], columns: dict[str, str], reserved: Collection[str]) -> None:
    """Raise a PromptTableError if two columns of the output had one name, or two but for case.

    DuckDB, and SQL at large, tells no names apart that differ only in case.
    """
    output = {name.casefold(): name for name in reserved}
    own: dict[str, str] = {}
    for name in extras:
        low = name.casefold()
        other = output.get(low)
        if other is None:
            if low in own:
                raise PromptTableError(
                    f"columns {own[low]!r} and {name!r} of the table = names that differ only in "
                    f"case: DuckDB cannot tell them apart. Rename one, or {_leave_out(extras, low)}"
                )
            own[low] = name
        elif name != other and other in COLUMNS and other not in columns:
            raise PromptTableError(
                f"column {name!r} of the table = the name of the output column {other!r} but for "
                f"its case, which DuckDB ignores: if it is the {other.replace('_', ' ')}, map it "
                f"with --set {_set_column(other, name)}; else leave it out with --set "
                f"{_set_column(other, None)}, or rename it."
            )
        else:
            case = "" if name == other else f" {other!r}, but for its case, which DuckDB ignores"
            raise PromptTableError(
                f"column {name!r} of the table = the name of an output column{case}: rename it, "
                f"or {_leave_out(extras, *output)}"
            )


def _leave_out(extras: Iterable[str], *names: str) -> str:
    rest = ", ".join(name for name in extras if name.casefold() not in names)
    return f"exclude it with --set 'prompts.keep=[{rest}]'"


def describe_columns(
    prompts: Prompts, sampling: Sampling, columns: dict[str, str], names: Collection[str]
) -> Iterator[str]:
    """Yield what a user should know of the columns: what they overrule, and what is not used.

    Args:
        prompts: the job's section.
        sampling: the job's section.
        columns: our name -> the table's name, of the columns that are used.
        names: of all columns of the table.
    """
    for ours in explicit_keys(sampling):
        if ours in columns:
            yield (
                f"column {columns[ours]!r} overrules sampling.{ours} = "
                f"{short_repr(getattr(sampling, ours))} in every row where it is not empty; "
                f"{_set_column(ours, None)} turns it off"
            )
    if "image" in columns:
        yield (
            f"rows are drawn from their pictures in column {columns['image']!r}; "
            f"{_set_column('image', None)} turns it off"
        )
    off = [ours for ours, theirs in prompts.columns.items() if theirs is None and ours != "id"]
    for name in names:
        if name.casefold() in off and name not in columns.values():
            key = name.casefold()
            yield f"column {name!r} is not used and not copied: prompts.columns.{key} = null"
    for name in names:
        likely = _KEYS.get(_normal(name))
        decided = name in columns.values() or name in (prompts.keep or ())
        if likely is None or likely in columns or likely in prompts.columns or decided:
            continue
        state = "copied, not used" if prompts.keep is None else "not used"
        meaning = _MEANINGS.get(likely, likely.replace("_", " "))
        yield f"column {name!r} is {state}: if it is the {meaning}, set {_set_column(likely, name)}"


def explicit_keys(sampling: Sampling) -> list[str]:
    """Return the keys that the job sets; of a section with all keys, such as job.yaml's, those
    that are not the default.
    """
    keys = [name for name in Sampling.model_fields if name in sampling.model_fields_set]
    if len(keys) < len(Sampling.model_fields):
        return keys
    return [name for name in keys if getattr(sampling, name) != Sampling.model_fields[name].default]

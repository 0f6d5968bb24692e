"""Writes job.md, the reference of all keys of the job file, from the code that reads them.

python docs/reference.py
"""

from pathlib import Path
from typing import Any

from sdbatch.job import Job
from sdbatch.samplers import NAMES
from sdbatch.sampling import KEYS, Sampling

PAGE = Path(__file__).parent / "job.md"
HEAD = """# The job file

Every key, written by `python docs/reference.py`. `sdbatch schema` prints the same as JSON Schema.
`prompts.path` (or `prompts.rows`), `model` and `output.path` are required.
`--set section.key=value` overrides a key.
"""
SAMPLING = """
The names on the right are AUTOMATIC1111's: in the text of parameters that each image carries, and
in its API.
"""
LISTED = {"DrawAgain"}  # sections whose keys have another table: those of sampling
SKIPPED = {"sampler"}  # whose values have a list of their own


def page() -> str:
    """Return the whole page."""
    schema = Job.model_json_schema()
    parts = [HEAD, table("", schema, schema["$defs"])]
    for name, value in schema["properties"].items():
        section = section_of(value, schema["$defs"])
        if section is not None:
            parts.append(f"\n## {name}\n\n{section['description']}\n")
            parts.append(SAMPLING if name == "sampling" else "")
            parts.append(table(name, section, schema["$defs"]))
    parts.append(f"\nSamplers: {', '.join(NAMES)}.\n")
    return "\n".join(part.strip("\n") + "\n" for part in parts if part)


def table(where: str, section: dict[str, Any], defs: dict[str, Any]) -> str:
    """Return the keys of a section as a table; those of sections inside it follow."""
    sampling = where == "sampling"
    head = "| key | value | default | meaning |" + (" label | API |" if sampling else "")
    lines = [head, "|---" * (head.count("|") - 1) + "|"]
    inner = ""
    for name, value in section["properties"].items():
        found = section_of(value, defs)
        if not where and found is not None:
            continue
        row = [f"`{name}`", kind(value, defs, name), default(value, name, section), meaning(value)]
        if sampling:
            key = KEYS[name]
            row += [key.a1111_label or "", key.a1111_parameter or ""]
        lines.append(f"| {' | '.join(row)} |")
        if found is not None and found["title"] not in LISTED:
            inner += f"\n### {where}.{name}\n\n{found['description']}\n\n"
            inner += table(f"{where}.{name}", found, defs)
    return "\n".join(lines) + "\n" + inner


def section_of(value: dict[str, Any], defs: dict[str, Any]) -> dict[str, Any] | None:
    """Return the section that a key holds, also in a list or as one of several kinds."""
    for each in (value, value.get("items", {}), *value.get("anyOf", [])):
        if "$ref" in each:
            found: dict[str, Any] = defs[each["$ref"].rpartition("/")[2]]
            return found
    return None


def kind(value: dict[str, Any], defs: dict[str, Any], name: str = "") -> str:
    """Return what a key may be."""
    if name in SKIPPED:
        return "a sampler, see below"
    if "anyOf" in value:
        return " or ".join(dict.fromkeys(kind(each, defs) for each in value["anyOf"]))
    if "$ref" in value:
        return "a section"
    for word in ("enum", "const"):
        if word in value:
            values = value[word] if word == "enum" else [value[word]]
            return ", ".join(f"`{each}`" for each in values)
    text = {
        "integer": "whole number",
        "number": "number",
        "string": "text",
        "boolean": "true or false",
        "null": "null",
        "object": "a section of keys",
    }.get(value.get("type", ""), "any value")
    if value.get("type") == "array":
        text = f"list of: {kind(value.get('items', {}), defs)}"
    return text + bounds(value)


def bounds(value: dict[str, Any]) -> str:
    """Return the range of a number."""
    names = {
        "minimum": "at least",
        "exclusiveMinimum": "above",
        "maximum": "at most",
        "multipleOf": "a multiple of",
    }
    parts = [f"{text} {value[name]:,}" for name, text in names.items() if name in value]
    return f" ({', '.join(parts)})" if parts else ""


def default(value: dict[str, Any], name: str, section: dict[str, Any]) -> str:
    """Return the default of a key."""
    if name in section.get("required", []):
        return "required"
    found = value.get("default")
    if found is None or isinstance(found, dict):
        return ""
    return (
        f"`{str(found).lower() if isinstance(found, bool) else found}`" if found != "" else "empty"
    )


def meaning(value: dict[str, Any]) -> str:
    """Return the description of a key."""
    return " ".join(value.get("description", "").split()).replace("|", "\\|")


if __name__ == "__main__":
    assert set(KEYS) == set(Sampling.model_fields), "every sampling key has an entry"
    PAGE.write_text(page(), encoding="utf-8")

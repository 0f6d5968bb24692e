"""The files of cluster/, held to what reads them: KubeRay's schemas, Ray's, and sdbatch itself."""

import copy
import json
import shlex
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
FILES = ROOT / "cluster"


def documents(name: str) -> list[dict]:
    return list(yaml.safe_load_all((FILES / name).read_text()))


def top(path: Path) -> str:
    """Return the comment that a file begins with, without its marks."""
    lines = path.read_text().splitlines()
    lines = lines[1:] if lines[0].startswith("#!") else lines
    comment = []
    for line in lines:
        if not line.startswith("#"):
            break
        comment.append(line.removeprefix("#"))
    return "\n".join(comment)


def strict(schema: dict) -> dict:
    """Return a JSON Schema that refuses what it doesn't know, where it didn't say that it may be.

    Kubernetes drops unknown fields in silence, and so their schemas let them pass.
    """
    schema = copy.deepcopy(schema)
    parts = [schema]
    while parts:
        part = parts.pop()
        if not isinstance(part, dict):
            parts += part if isinstance(part, list) else []
            continue
        open_to_all = part.get("x-kubernetes-preserve-unknown-fields", False)
        if isinstance(part.get("properties"), dict) and not open_to_all:
            part.setdefault("additionalProperties", False)
        parts += part.values()
    return schema


def read_by_ray(line: str) -> None:
    """Have Ray read the options of the `ray ...` in a line: it fails on an unknown one."""
    from ray.scripts import scripts

    words = shlex.split(line)
    name, *options = words[words.index("ray") + 1 :]
    scripts.cli.commands[name].make_context(name, options)


def read_schema(path: Path) -> dict:
    return strict(json.loads(path.read_text()))

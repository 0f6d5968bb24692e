"""YAML in which a key that stands twice is an error, not a silent last-one-wins."""

from typing import Any

import yaml

from sdbatch.errors import JobError

_MERGE = "tag:yaml.org,2002:merge"  # `<<`, whose keys may stand again


class _Twice(yaml.YAMLError):
    """A key stands twice."""


class _Loader(yaml.SafeLoader):
    """A SafeLoader whose mappings are `_mapping`'s."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value if key.tag != _MERGE]
    for number, key in enumerate(keys):
        if key in keys[:number]:
            mark = node.value[number][0].start_mark
            raise _Twice(f"line {mark.line + 1}: key {key!r} stands twice: keep one of them.")
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def parse(text: str, where: str) -> Any:
    """Return what the YAML `text` holds.

    Raises:
        JobError: it is no YAML, or a key stands twice; begins with `where` and says the line.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except _Twice as error:
        raise JobError(f"{where} {error}") from error
    except (yaml.YAMLError, ValueError) as error:  # a date that is none is a ValueError
        raise JobError(f"{where} = no YAML: {' '.join(str(error).split())}.") from error

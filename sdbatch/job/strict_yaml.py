"""YAML in which a repeated key is an error; PyYAML silently takes the last one."""

from typing import Any

import yaml

from sdbatch.errors import JobError, one_line

_MERGE = "tag:yaml.org,2002:merge"  # `<<`, whose keys may be repeated


class _RepeatedKeyError(yaml.YAMLError):
    """A key appears twice in a mapping."""


class _Loader(yaml.SafeLoader):
    """A SafeLoader that builds mappings with `_construct_mapping`."""


def _construct_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value if key.tag != _MERGE]
    for number, key in enumerate(keys):
        if key in keys[:number]:
            mark = node.value[number][0].start_mark
            raise _RepeatedKeyError(
                f"line {mark.line + 1}: key {key!r} appears twice: keep one of them."
            )
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)


def parse(text: str, where: str) -> Any:
    """Return the value of the YAML `text`; an error begins with `where` and names the line.

    Raises:
        JobError: the text is not YAML, or a key appears twice.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except _RepeatedKeyError as error:
        raise JobError(f"{where} {error}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that does not exist
        raise JobError(f"{where} = not YAML: {one_line(error)}.") from error

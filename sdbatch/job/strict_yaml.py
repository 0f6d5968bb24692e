"""YAML in which a repeated key is an error, and which stays as small as it was written.

PyYAML takes the last of repeated keys without a word, and an alias of an alias of an alias makes
gigabytes of a few hundred bytes, as soon as the value is validated or written.
"""

import itertools
from typing import Any

import yaml

from sdbatch.errors import JobError, one_line, short_repr

MAX_CHARACTERS = 10_000_000  # of a file with its aliases written out
MAX_NODES = 1_000_000  # texts, lists and mappings: each takes some hundred bytes to read
MAX_DEPTH = 50  # of lists and mappings inside each other
_MERGE = "tag:yaml.org,2002:merge"  # `<<`: other keys win over those that it merges


class _LineError(yaml.YAMLError):
    """A line is YAML, but not what is read here."""

    def __init__(self, node: Any, text: str) -> None:
        super().__init__(f"line {node.start_mark.line + 1}: {text}")


class _Loader(yaml.CSafeLoader):
    """A CSafeLoader that checks the tree of nodes before it builds values of it."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._measured: dict[yaml.Node, tuple[int, int]] = {}

    def get_single_node(self) -> yaml.Node | None:
        """Return the root of the document; None if the text is empty."""
        root: yaml.Node | None = super().get_single_node()
        if root is not None:
            self._measure(root, 0)
        return root

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Return the value of a node."""
        try:
            value = super().construct_object(node, deep)
            if isinstance(value, int):
                repr(value)  # a ValueError beyond 4,300 digits, which no other error could show
            return value
        except (ValueError, LookupError, AttributeError) as error:  # PyYAML's, for a scalar
            kind = node.tag.rpartition(":")[2]
            raise _LineError(
                node, f"{short_repr(node.value)} is not a valid {kind}. Quote it if it is text."
            ) from error

    def _measure(self, node: yaml.Node, level: int) -> tuple[int, int]:
        """Return a node's number of characters, aliases written out, and its depth.

        Args:
            node: the node, each of which is measured once.
            level: number of nodes that it is inside of.
        """
        if isinstance(node, yaml.ScalarNode):
            return len(node.value) + 1, 0
        if node not in self._measured:
            self._measured[node] = (MAX_CHARACTERS, 0)  # for an alias that is inside its anchor
            children = node.value
            if isinstance(node, yaml.MappingNode):
                self._check_keys(node)
                children = itertools.chain.from_iterable(node.value)
            if level == MAX_DEPTH:
                raise _too_deep(node)
            sizes = [self._measure(child, level + 1) for child in children]
            characters = 1 + sum(characters for characters, _ in sizes)
            depth = 1 + max((depth for _, depth in sizes), default=0)
            if depth > MAX_DEPTH:
                raise _too_deep(node)
            if characters > MAX_CHARACTERS:
                raise _LineError(
                    node,
                    f"more than {MAX_CHARACTERS:,} characters with the aliases written out: must "
                    f"be fewer. Use fewer aliases, or shorten the text.",
                )
            self._measured[node] = (characters, depth)
        return self._measured[node]

    def _check_keys(self, mapping: yaml.MappingNode) -> None:
        keys = set()
        for node, _ in mapping.value:
            if not isinstance(node, yaml.ScalarNode):
                raise _LineError(node, "a key is a list or a mapping: must be text or a number.")
            if node.tag == _MERGE:
                continue
            key = self.construct_object(node)
            if key in keys:
                raise _LineError(node, f"key {short_repr(key)} appears twice: keep one of them.")
            keys.add(key)


def _too_deep(node: yaml.Node) -> _LineError:
    return _LineError(
        node, f"more than {MAX_DEPTH} lists and mappings inside each other: must be fewer."
    )


def _check_size(text: str) -> None:
    """Count the nodes of a long text before they are in memory."""
    if len(text) > MAX_NODES:
        events = yaml.parse(text, Loader=yaml.CSafeLoader)
        nodes = (event for event in events if isinstance(event, yaml.NodeEvent))
        for event in itertools.islice(nodes, MAX_NODES, None):
            raise _LineError(
                event,
                f"more than {MAX_NODES:,} keys and values: must be fewer. Put prompts into a "
                f"table, prompts.path.",
            )


def parse(text: str, where: str) -> Any:
    """Return the value of the YAML `text`; an error begins with `where` and names the line.

    Raises:
        JobError: the text is not YAML, a key appears twice, or its aliases make it too large.
    """
    try:
        _check_size(text)
        return yaml.load(text, Loader=_Loader)
    except _LineError as error:
        raise JobError(f"{where} {error}") from error
    except (yaml.YAMLError, UnicodeEncodeError) as error:  # the latter: half a surrogate pair
        raise JobError(f"{where} = not YAML: {one_line(error)}.") from error

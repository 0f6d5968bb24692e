"""Prompts whose text changes from step to step, as AUTOMATIC1111 reads them.

[before:after:when], [after:when], [before::when], [one|other], each within another too. What is
none of these is text, as (word) and [word] are here: prompt_syntax.parse_weights reads them later.
Source: AUTOMATIC1111's modules/prompt_parser.py, get_learned_conditioning_prompt_schedules.
"""

import re
from dataclasses import dataclass, field
from typing import TypeAlias

_TOKEN = re.compile(r"(?:[^\\\[\]():|]|\\.)+|[\[\]():|]")
_CLOSING = {"(": ")", "[": "]"}
_WHEN = re.compile(r"\s*([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)\s*")
_INSIDE = r"(?:\\.|[^\\\[\]]|\[(?:\\.|[^\\\[\]])*\])*?"  # of [ ], with one pair within it
OVER_TIME = re.compile(  # what is hardly meant as text
    rf"(?<!\\)\[{_INSIDE}:\s*(?:\d+\.?\d*|\.\d+)\s*\]|(?<!\\)\[{_INSIDE}\|"
)


@dataclass(frozen=True, slots=True)
class Calls:
    """The denoiser calls of an image, as AUTOMATIC1111 counts them: steps * calls per step.

    Also if fewer are made, as from a picture.
    """

    count: int
    first_pass: int = 0  # of the pass before, in a second pass: 0.5 is within the first, 1.5 here


@dataclass(frozen=True, slots=True, eq=False)
class _Edit:
    """The text before a call, and the text after it."""

    before: "list[_Node]"
    after: "list[_Node]"
    when: str  # a share of the calls if it has a point, else a number of calls

    def last_call(self, calls: Calls) -> int:
        """Return the last call, from 1, with the text before; 0 or less: none."""
        if "." in self.when:
            call = (float(self.when) - bool(calls.first_pass)) * calls.count
        else:
            call = float(self.when) - calls.first_pass
        return int(max(0, min(calls.count, call)))

    def nodes(self, call: int, calls: Calls) -> "list[_Node]":
        """Return what it is at a call, from 1."""
        return self.before if call <= self.last_call(calls) else self.after


@dataclass(frozen=True, slots=True, eq=False)
class _Alternation:
    """Texts that take turns."""

    options: "list[list[_Node]]"

    def nodes(self, call: int, _: Calls) -> "list[_Node]":
        """Return what it is at a call, from 1."""
        return self.options[(call - 1) % len(self.options)]


@dataclass(frozen=True, slots=True, eq=False)
class _Group:
    """Text in brackets."""

    content: "list[_Node]"

    def nodes(self, *_: object) -> "list[_Node]":
        """Return what it is at any call."""
        return self.content


_Node: TypeAlias = str | _Edit | _Alternation | _Group


@dataclass(slots=True)
class _Bracket:
    """An open bracket."""

    mark: str  # "(" or "["; "": the prompt itself
    nodes: list[_Node] = field(default_factory=list)  # ":" and "|" are marks of their own
    is_text: bool = False  # it holds a bracket without its other half, or one that is text alone


@dataclass(slots=True)
class _Tree:
    """A prompt that was read."""

    nodes: list[_Node]
    edits: list[_Edit]
    alternates: bool


def schedule(prompt: str, calls: Calls) -> list[tuple[int, str]]:
    """Return the texts of `prompt` in order, each with the last denoiser call that it is used in.

    Calls count from 0 here, and AUTOMATIC1111 numbers its steps from 1. So the first text is used
    in one call more than it names: of [a|b], a is used in the calls 0, 1, 3, 5, and so on.

    Raises:
        ValueError: AUTOMATIC1111 would take the whole prompt as text, though it holds such syntax.
    """
    tree = _parse(prompt) if "[" in prompt else None
    if tree is None:
        if match := OVER_TIME.search(prompt):
            raise ValueError(
                f"{match[0]!r}: must be [before:after:when] or [one|other], in a prompt with no "
                f"other | and no \\ at its end. Write \\| for a plain |"
            )
        return [(calls.count, prompt)]
    ends = {calls.count, *(edit.last_call(calls) for edit in tree.edits)}
    if tree.alternates:
        ends.update(range(1, calls.count + 1))
    return [(end, _text_at(tree.nodes, end, calls)) for end in sorted(ends) if end > 0]


def _text_at(nodes: list[_Node], call: int, calls: Calls) -> str:
    texts: list[str] = []
    left = nodes[::-1]
    while left:  # not by recursion: a prompt may nest thousands
        node = left.pop()
        if isinstance(node, str):
            texts.append(node)
        else:
            left += node.nodes(call, calls)[::-1]
    return "".join(texts)


def _parse(prompt: str) -> _Tree | None:
    """Read a prompt; None: it is all text, as it has a | or a backslash where none can be."""
    tree = _Tree([], [], False)
    opened = [_Bracket("", tree.nodes)]
    end = 0
    for match in _TOKEN.finditer(prompt):
        if match.start() != end:
            return None
        end = match.end()
        token = match[0]
        if token in _CLOSING:
            opened.append(_Bracket(token))
        elif token not in _CLOSING.values():
            opened[-1].nodes.append(token)
        elif _CLOSING.get(opened[-1].mark) != token:
            _give_up(opened)
            tree.nodes.append(token)
        elif not _close(opened, token, tree):
            return None
    _give_up(opened)
    return None if end != len(prompt) or "|" in tree.nodes else tree


def _give_up(opened: list[_Bracket]) -> None:
    """Make all open brackets text: a bracket without its other half is among what they hold."""
    root = opened[0].nodes
    for bracket in opened[1:]:
        root += [bracket.mark, *bracket.nodes]
    del opened[1:]


def _close(opened: list[_Bracket], token: str, tree: _Tree) -> bool:
    """Close the last open bracket; return False if it holds a | where none can be."""
    bracket = opened.pop()
    node = None if bracket.is_text else _make_node(bracket.mark, bracket.nodes)
    if node is None:
        if "|" in bracket.nodes:
            return False
        node = _Group([bracket.mark, *bracket.nodes, token])
        opened[-1].is_text = True
    if isinstance(node, _Edit):
        tree.edits.append(node)
    tree.alternates |= isinstance(node, _Alternation)
    opened[-1].nodes.append(node)
    return True


def _make_node(mark: str, nodes: list[_Node]) -> _Node | None:
    """Return what brackets with these nodes are; None: text alone, and so is what they are in."""
    marks = [node for node in nodes if node in (":", "|")]
    if mark == "(":
        return _Group(["(", *nodes, ")"]) if marks in ([], [":"]) else None
    if not marks:
        return _Group(["[", *nodes, "]"])
    parts: list[list[_Node]] = [[]]
    for node in nodes:
        if node in (":", "|"):
            parts.append([])
        else:
            parts[-1].append(node)
    if set(marks) == {"|"}:
        return _Alternation(parts)
    *texts, last = parts
    when = _WHEN.fullmatch(last[0]) if len(last) == 1 and isinstance(last[0], str) else None
    if when is None or marks not in ([":"], [":", ":"]):
        return None
    return _Edit(texts[0] if len(texts) == 2 else [], texts[-1], when[1])

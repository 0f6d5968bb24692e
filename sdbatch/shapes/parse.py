"""A prompt's words back to the scene that they ask for, and to what they leave open."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache

from sdbatch.shapes import vocabulary
from sdbatch.shapes.world import Group, Scene

END = ("end", "")  # of a clause
_WEIGHT = re.compile(r":\s*[+-]?[\d.]+\s*(?=[)\]])")  # as in (red:1.3), where prompts have weights


def asked(prompt: str) -> Scene | None:
    """Return what `prompt` asks for; None if it names no shape of the world.

    Words that are not the world's are skipped, as a model that never saw them would.
    """
    reader = _Reader()
    for kind, value in _terms(prompt):
        reader.take(kind, value)
    return reader.scene() if reader.groups else None


@dataclass
class _Reader:
    groups: list[Group] = field(default_factory=list)
    adjectives: dict[str, str] = field(default_factory=dict)  # not yet of anything
    background: dict[str, str] = field(default_factory=dict)
    places: list[str] = field(default_factory=list)
    relation: str | None = None

    def take(self, kind: str, value: str) -> None:
        if kind in ("one", "several"):
            self._group(value, 1 if kind == "one" else None)
        elif kind == "background" or (kind == "end" and self._waits_for_a_background()):
            self.background = self.background or self.adjectives
            self.adjectives = {}
        elif kind == "after" and self.groups:
            self.groups[-1] = replace(self.groups[-1], texture=value)
        elif kind == "place":
            self.places.append(value)
        elif kind == "relation":
            self.relation = self.relation or value
        elif kind in ("colour", "size", "texture", "count"):
            self.adjectives[kind] = value

    def _waits_for_a_background(self) -> bool:
        return bool(self.groups) and "colour" in self.adjectives

    def _group(self, shape: str, count: int | None) -> None:
        said = self.adjectives
        number = int(said["count"]) if "count" in said else count
        self.groups.append(
            Group(
                shape=shape,
                colour=said.get("colour"),
                count=number,
                size=said.get("size"),
                texture=said.get("texture"),
            )
        )
        self.adjectives = {}

    def scene(self) -> Scene:
        relation, place = None, None
        if len(self.groups) == 2:
            sides = {pair: name for name, pair in vocabulary.SIDES.items()}
            relation = self.relation or sides.get(tuple(self.places))  # type: ignore[arg-type]
        elif len(self.groups) == 1 and self.places:
            place = self.places[0]
        return Scene(
            groups=tuple(self.groups),
            background=self.background.get("colour"),
            background_texture=self.background.get("texture"),
            place=place,
            relation=relation,
        )


def _terms(prompt: str) -> Iterator[tuple[str, str]]:
    """Yield what the phrases of `prompt` mean, the longest phrase first where several begin."""
    tokens = _tokens(prompt)
    meanings = _meanings()
    longest = max(len(phrase) for phrase in meanings)
    at = 0
    while at < len(tokens):
        for length in range(longest, 0, -1):
            meaning = meanings.get(tuple(tokens[at : at + length]))
            if meaning is not None:
                yield meaning
                break
        at += length
    yield END


@cache
def _meanings() -> dict[tuple[str, ...], tuple[str, str]]:
    """Return every phrase of the world with its kind and its meaning."""
    phrases = {",": END, ".": END, "with": END}
    for kind, names in (
        ("colour", vocabulary.COLOURS),
        ("size", vocabulary.SIZES),
        ("texture", vocabulary.TEXTURES),
        ("count", {str(count): said for count, said in vocabulary.COUNTS.items()}),
        ("place", vocabulary.PLACES),
        ("relation", vocabulary.RELATIONS),
        ("after", vocabulary.AFTER),
        ("background", {"background": vocabulary.BACKGROUNDS}),
        ("one", vocabulary.SHAPES),
        (
            "several",
            {name: tuple(map(vocabulary.plural, said)) for name, said in vocabulary.SHAPES.items()},
        ),
    ):
        phrases |= {phrase: (kind, meaning) for meaning, said in names.items() for phrase in said}
    return {tuple(_tokens(phrase)): meaning for phrase, meaning in phrases.items()}


def _tokens(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+|[,.]", _WEIGHT.sub(" ", text.lower()))

"""Parses a prompt into the scene that it asks for."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache

from sdbatch.shapes import vocabulary
from sdbatch.shapes.world import Group, Scene

END = ("end", "")  # the end of a clause
_WEIGHT = re.compile(r":\s*[+-]?[\d.]+\s*(?=[)\]])")  # the weight in a prompt such as (red:1.3)


def parse_prompt(prompt: str) -> Scene | None:
    """Return the scene that `prompt` asks for, or None if it names no known shape.

    Attributes that the prompt does not mention are None. Unknown words are skipped, because a
    model that never saw them cannot use them either.
    """
    parser = _PromptParser()
    for kind, value in _terms(prompt):
        parser.add_term(kind, value)
    return parser.scene() if parser.groups else None


@dataclass
class _PromptParser:
    groups: list[Group] = field(default_factory=list)
    adjectives: dict[str, str] = field(default_factory=dict)  # of the next noun, by kind
    background: dict[str, str] = field(default_factory=dict)
    places: list[str] = field(default_factory=list)
    relation: str | None = None

    def add_term(self, kind: str, value: str) -> None:
        if kind in ("singular", "plural"):
            self._add_group(value, 1 if kind == "singular" else None)
        elif kind == "background" or (kind == "end" and self._ends_with_bare_colour()):
            self.background = self.background or self.adjectives
            self.adjectives = {}
        elif kind == "texture suffix" and self.groups:
            self.groups[-1] = replace(self.groups[-1], texture=value)
        elif kind == "place":
            self.places.append(value)
        elif kind == "relation":
            self.relation = self.relation or value
        elif kind in ("colour", "size", "texture", "count"):
            self.adjectives[kind] = value

    def _ends_with_bare_colour(self) -> bool:
        """Return whether a colour without a noun follows a group: "a circle on blue"."""
        return bool(self.groups) and "colour" in self.adjectives

    def _add_group(self, shape: str, default_count: int | None) -> None:
        adjectives = self.adjectives
        count = int(adjectives["count"]) if "count" in adjectives else default_count
        self.groups.append(
            Group(
                shape=shape,
                colour=adjectives.get("colour"),
                count=count,
                size=adjectives.get("size"),
                texture=adjectives.get("texture"),
            )
        )
        self.adjectives = {}

    def scene(self) -> Scene:
        relation, place = None, None
        if len(self.groups) == 2:
            relations = {pair: name for name, pair in vocabulary.RELATION_PLACES.items()}
            relation = self.relation or relations.get(tuple(self.places))  # type: ignore[arg-type]
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
    """Yield kind and meaning of each known phrase; where several begin, the longest one."""
    tokens = _tokenize(prompt)
    meanings = _phrase_meanings()
    longest = max(len(phrase) for phrase in meanings)
    position = 0
    while position < len(tokens):
        for length in range(longest, 0, -1):
            meaning = meanings.get(tuple(tokens[position : position + length]))
            if meaning is not None:
                yield meaning
                break
        position += length
    yield END


@cache
def _phrase_meanings() -> dict[tuple[str, ...], tuple[str, str]]:
    """Return the kind and the meaning of every known phrase, by the tokens of the phrase."""
    phrases = {",": END, ".": END, "with": END}
    for kind, vocabulary_of_kind in (
        ("colour", vocabulary.COLOURS),
        ("size", vocabulary.SIZES),
        ("texture", vocabulary.TEXTURES),
        ("count", {str(count): names for count, names in vocabulary.COUNTS.items()}),
        ("place", vocabulary.PLACES),
        ("relation", vocabulary.RELATIONS),
        ("texture suffix", vocabulary.TEXTURE_SUFFIXES),
        ("background", {"background": vocabulary.BACKGROUNDS}),
        ("singular", vocabulary.SHAPES),
        (
            "plural",
            {
                shape: tuple(map(vocabulary.plural, names))
                for shape, names in vocabulary.SHAPES.items()
            },
        ),
    ):
        phrases |= {
            name: (kind, meaning) for meaning, names in vocabulary_of_kind.items() for name in names
        }
    return {tuple(_tokenize(phrase)): meaning for phrase, meaning in phrases.items()}


def _tokenize(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+|[,.]", _WEIGHT.sub(" ", text.lower()))

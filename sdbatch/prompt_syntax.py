"""AUTOMATIC1111's syntax in prompts: its weights are read, the rest is recognised.

Weights are (word), (word:1.3), [word], and \\( for a plain bracket. Without torch: the plan of a
job looks at prompts too.
Source: AUTOMATIC1111's wiki, Features, "Attention/emphasis".
"""

import re

ROUND, SQUARE = 1.1, 1 / 1.1  # factors of the weight, for a pair of brackets

_PART = re.compile(
    r"\\(?P<plain>[()\[\]\\])"
    r"|:\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)"
    r"|(?P<bracket>[()\[\]])"
    r"|(?P<text>[^\\()\[\]:]+|[:\\])"
)
_INSIDE = r"(?:\\.|[^\\\[\]]|\[(?:\\.|[^\\\[\]])*\])*?"  # of [ ], with one pair within it
_OTHER_SYNTAX = re.compile(
    r"<(?:lora|lyco|hypernet):|\bBREAK\b|\bAND\b"
    rf"|(?<!\\)\[{_INSIDE}:\s*(?:\d+\.?\d*|\.\d+)\s*\]|(?<!\\)\[{_INSIDE}\|"
)
_WEIGHT = re.compile(r"(?<!\\)\([^()]+:\s*[+-]?(?:\d+\.?\d*|\.\d+)\s*\)|(?<!\\)\(\([^()]+\)\)")


def find_syntax(prompt: str) -> str | None:
    """Return the first part of `prompt` that is hardly meant as text; None without one.

    Plain (word) and [word] are not counted: brackets are common in captions.
    """
    match = _OTHER_SYNTAX.search(prompt) or _WEIGHT.search(prompt)
    return match and match[0]


def parse_weights(prompt: str) -> list[tuple[str, float]]:
    """Return the parts of `prompt` with their weights.

    An opening bracket without a closing one applies to the rest of the prompt.

    Raises:
        ValueError: the prompt uses other syntax of AUTOMATIC1111 than weights.
    """
    if match := _OTHER_SYNTAX.search(prompt):
        raise ValueError(
            f"{match[0]!r}: networks, prompt editing, BREAK and AND are not supported in prompts. "
            f"Remove it; LoRAs belong in model.loras"
        )
    parts: list[tuple[str, float]] = []
    starts: dict[str, list[int]] = {"(": [], "[": []}  # of the parts in each open bracket

    def close(kind: str, factor: float) -> None:
        start = starts[kind].pop()
        parts[start:] = [(text, weight * factor) for text, weight in parts[start:]]

    for match in _PART.finditer(prompt):
        bracket = match["bracket"]
        if bracket in ("(", "["):
            starts[bracket].append(len(parts))
        elif match["weight"] and starts["("]:
            close("(", float(match["weight"]))
        elif bracket == ")" and starts["("]:
            close("(", ROUND)
        elif bracket == "]" and starts["["]:
            close("[", SQUARE)
        else:
            parts.append((match["plain"] or match[0], 1.0))
    for kind, factor in (("(", ROUND), ("[", SQUARE)):
        while starts[kind]:
            close(kind, factor)
    return _join_equal_weights(parts)


def _join_equal_weights(parts: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """Join neighbours of the same weight."""
    joined: list[tuple[str, float]] = []
    for text, weight in parts:
        if joined and joined[-1][1] == weight:
            joined[-1] = (joined[-1][0] + text, weight)
        else:
            joined.append((text, weight))
    return joined

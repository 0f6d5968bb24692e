"""AUTOMATIC1111's weights in prompts: (word), (word:1.3), [word], and \\( for a plain bracket.

Source: AUTOMATIC1111's wiki, Features, "Attention/emphasis".
"""

import re

ROUND, SQUARE = 1.1, 1 / 1.1  # what one pair of brackets multiplies the weight by

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


def parse(prompt: str) -> list[tuple[str, float]]:
    """Return the parts of `prompt` with the weight of each; brackets that stay open end with it.

    Raises:
        ValueError: the prompt uses syntax of AUTOMATIC1111's that is more than weights.
    """
    if found := _OTHER_SYNTAX.search(prompt):
        raise ValueError(
            f"{found[0]!r}: networks, prompt editing, BREAK and AND are not drawn from the prompt. "
            f"Take it out; LoRAs stand in model.loras"
        )
    parts: list[tuple[str, float]] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}  # where each open bracket's parts begin

    def close(kind: str, factor: float) -> None:
        start = opened[kind].pop()
        parts[start:] = [(text, weight * factor) for text, weight in parts[start:]]

    for found in _PART.finditer(prompt):
        bracket = found["bracket"]
        if bracket in ("(", "["):
            opened[bracket].append(len(parts))
        elif found["weight"] and opened["("]:
            close("(", float(found["weight"]))
        elif bracket == ")" and opened["("]:
            close("(", ROUND)
        elif bracket == "]" and opened["["]:
            close("[", SQUARE)
        else:
            parts.append((found["plain"] or found[0], 1.0))
    for kind, factor in (("(", ROUND), ("[", SQUARE)):
        while opened[kind]:
            close(kind, factor)
    return _joined(parts)


def _joined(parts: list[tuple[str, float]]) -> list[tuple[str, float]]:
    joined: list[tuple[str, float]] = []
    for text, weight in parts:
        if joined and joined[-1][1] == weight:
            joined[-1] = (joined[-1][0] + text, weight)
        else:
            joined.append((text, weight))
    return joined

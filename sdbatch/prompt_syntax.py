"""AUTOMATIC1111's syntax in prompts: weights, texts over time, BREAK and LoRAs are read.

Weights are (word), (word:1.3), [word], and \\( for a plain bracket. Texts over time are
[before:after:when] and [one|other]. BREAK begins a new chunk. LoRAs are <lora:name:0.8>; the
sampling key `loras` gives the same as "name:0.8, other". Without torch: the plan of a job looks at
prompts too.
Source: AUTOMATIC1111's wiki, Features, "Attention/emphasis", "Prompt editing" and "Extra
networks"; its modules/prompt_parser.py.
"""

import difflib
import re
from collections.abc import Mapping

from sdbatch.prompt_schedule import OVER_TIME

ROUND, SQUARE = 1.1, 1 / 1.1  # factors of the weight, for a pair of brackets
MAX_LORA_WEIGHT = 10
LORA_FORM = (
    f"NAME or NAME:WEIGHT, with a weight from -{MAX_LORA_WEIGHT} to {MAX_LORA_WEIGHT} and "
    f"commas between LoRAs, such as 'ink:0.8, fur'"
)

_PART = re.compile(
    r"\\(?P<plain>[()\[\]\\]?)"  # a backslash before anything else is dropped
    r"|:\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)"
    r"|(?P<bracket>[()\[\]])"
    r"|(?P<text>[^\\()\[\]:]+|:)"
)
_BREAK = re.compile(r"\s*\bBREAK\b\s*")
_UNSUPPORTED = re.compile(r"<(?:lora|lyco|hypernet):|\bAND\b")
_NOT_TEXT = re.compile("|".join(each.pattern for each in (_UNSUPPORTED, _BREAK, OVER_TIME)))
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)")
_LORA_TAG = re.compile(r"<(?:lora|lyco):([^<>]*)>")
_WEIGHT = re.compile(r"(?<!\\)\([^()]+:\s*[+-]?(?:\d+\.?\d*|\.\d+)\s*\)|(?<!\\)\(\([^()]+\)\)")


def find_syntax(prompt: str) -> str | None:
    """Return the first part of `prompt` that is hardly meant as text; None without one.

    Plain (word) and [word] are not counted: brackets are common in captions.
    """
    match = _NOT_TEXT.search(prompt) or _WEIGHT.search(prompt)
    return match and match[0].strip()


def parse_loras(loras: str) -> list[tuple[str, float | None]]:
    """Return the names in a value of the sampling key `loras` with their weights; None: none given.

    Raises:
        ValueError: with what it must be.
    """
    return [_parse_lora(part) for part in loras.split(",")] if loras.strip() else []


def _parse_lora(text: str) -> tuple[str, float | None]:
    name, colon, number = (part.strip() for part in text.partition(":"))
    if not name or "<" in name or ">" in name or (colon and not _NUMBER.fullmatch(number)):
        raise ValueError(LORA_FORM)
    weight = float(number) if colon else None
    if weight is not None and abs(weight) > MAX_LORA_WEIGHT:
        raise ValueError(LORA_FORM)
    return name, weight


def choose_loras(
    prompt: str, loras: str, declared: Mapping[str, float]
) -> tuple[str, dict[str, float]]:
    """Return the prompt without its LoRAs' tags, and the weight of each LoRA that a row chooses.

    The weights of a LoRA that is named several times add up.

    Args:
        prompt: its tags are text if the job declares no LoRA.
        loras: the value of the sampling key.
        declared: the names that rows can choose, each with its weight where a row gives none.

    Raises:
        ValueError: a tag or a name that cannot be drawn.
    """
    chosen: dict[str, float] = {}

    def choose(name: str, weight: float | None, where: str) -> None:
        if name not in declared:
            raise ValueError(f"{where}: {_unknown_lora(name, declared)}")
        chosen[name] = chosen.get(name, 0.0) + (declared[name] if weight is None else weight)

    for tag in _LORA_TAG.finditer(prompt) if declared else ():
        where = f"prompt = {tag[0]!r}"
        if "," in tag[1] or tag[1].count(":") > 1:
            raise ValueError(f"{where}: must be <lora:NAME:WEIGHT>, one LoRA with one weight")
        try:
            name, weight = _parse_lora(tag[1])
        except ValueError as error:
            raise ValueError(f"{where}: must hold {error}") from error
        choose(name, weight, where)
    for name, weight in parse_loras(loras):
        choose(name, weight, f"loras = {loras!r}")
    return (_LORA_TAG.sub("", prompt) if declared else prompt), chosen


def write_loras(loras: str, declared: Mapping[str, float]) -> str:
    """Return a value of the sampling key `loras` with the weights that it leaves to the job."""
    named = [
        (name, declared.get(name) if weight is None else weight)
        for name, weight in parse_loras(loras)
    ]
    return ", ".join(name if weight is None else f"{name}:{weight:g}" for name, weight in named)


def lora_tags(loras: str) -> str:
    """Return a value of the sampling key `loras` as tags of a prompt."""
    parts = (part.strip() for part in loras.split(",") if part.strip())
    return "".join(f"<lora:{part}>" for part in parts)


def _unknown_lora(name: str, declared: Mapping[str, float]) -> str:
    if not declared:
        return f"{name!r} is unknown, as model.loras has no LoRA with a name. Give it one"
    close = difflib.get_close_matches(name, declared, n=1)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    return f"{name!r} is not the name of a LoRA. {hint}model.loras names {', '.join(declared)}"


def refuse_tags(name: str, prompt: str) -> None:
    """Raise a ValueError if another prompt than the row's own has a LoRA's tag.

    AUTOMATIC1111 reads none in a negative prompt.
    """
    if tag := _LORA_TAG.search(prompt):
        raise ValueError(
            f"{name} = {tag[0]!r}: a LoRA changes the whole image. Move it to the prompt, or "
            f"remove it"
        )


def parse_weights(prompt: str, *, chunked: bool) -> list[list[tuple[str, float]]]:
    """Return the parts of `prompt` with their weights, a list for each piece between BREAKs.

    An opening bracket without a closing one applies to the rest of the prompt.

    Args:
        prompt: one of those that `schedule` returns.
        chunked: whether the prompt may have several chunks.

    Raises:
        ValueError: the prompt uses syntax that is not supported, or BREAK where it cannot.
    """
    if match := _UNSUPPORTED.search(prompt):
        raise ValueError(
            f"{match[0]!r}: networks and AND are not supported in prompts. Remove it; LoRAs belong "
            f"in model.loras, with a name if prompts choose them"
        )
    pieces = [_parse_piece(piece) for piece in _BREAK.split(prompt)]
    if len(pieces) > 1 and not chunked:
        raise ValueError(
            "'BREAK': must have chunk_prompts: true, as it begins a new chunk. Set that, or remove "
            "BREAK"
        )
    if any(is_open for _, is_open in pieces[:-1]):
        raise ValueError(
            "'BREAK': must not be within brackets, where AUTOMATIC1111 reads it as a word. Close "
            "them before it"
        )
    return [parts for parts, _ in pieces]


def _parse_piece(prompt: str) -> tuple[list[tuple[str, float]], bool]:
    """Return the parts of a prompt without BREAK, and whether a bracket is left open."""
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
            parts.append((match[0] if match["plain"] is None else match["plain"], 1.0))
    is_open = bool(starts["("] or starts["["])
    for kind, factor in (("(", ROUND), ("[", SQUARE)):
        while starts[kind]:
            close(kind, factor)
    return _join_equal_weights(parts), is_open


def _join_equal_weights(parts: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """Join neighbours of the same weight."""
    joined: list[tuple[str, float]] = []
    for text, weight in parts:
        if joined and joined[-1][1] == weight:
            joined[-1] = (joined[-1][0] + text, weight)
        else:
            joined.append((text, weight))
    return joined

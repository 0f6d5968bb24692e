"""A prompt per line, as text or as AUTOMATIC1111's script "Prompts from file or textbox" reads it:
`--prompt "a dog" --seed 5 --steps 20`.

https://github.com/AUTOMATIC1111/stable-diffusion-webui/blob/master/scripts/prompts_from_file.py
"""

import re
import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING

from sdbatch.job import Reader
from sdbatch.prompts.rows import FAULT, Row
from sdbatch.sampling import KEYS

if TYPE_CHECKING:
    from sdbatch.prompts.text import Text

_TEXTS = ("prompt", "negative_prompt")
# AUTOMATIC1111's options -> our columns.
_OPTIONS = {
    **{name: name for name in (*_TEXTS, "seed")},
    **{key.a1111_parameter: name for name, key in KEYS.items() if key.a1111_parameter},
    "sampler_name": "sampler",
}
_IS_OPTIONS = re.compile(r"\s*--[a-z]\w*(\s|$)")


def parse_lines(text: "Text", _: Reader) -> Iterator[Row]:
    """Yield a row for each line that is not blank."""
    for number, line in enumerate(text, start=1):
        prompt = line.rstrip("\r\n")
        if _IS_OPTIONS.match(prompt):
            yield _parse_options(prompt, f"line {number}")
        elif prompt:
            yield {"prompt": prompt}


def _parse_options(line: str, where: str) -> Row:
    """Return the row of a line of options."""
    try:
        words = shlex.split(line)
    except ValueError as error:
        return {FAULT: f"{where} = {error}: must be options, quoted as in a shell"}
    row: Row = {"prompt": None}
    while words:
        option = words.pop(0)
        name = _OPTIONS.get(option.removeprefix("--"))
        if name is None or not option.startswith("--"):
            known = ", ".join(f"--{each}" for each in _OPTIONS)
            return {FAULT: f"{where} = {option!r}: must be one of {known}. Leave it out"}
        values = [words.pop(0)] if words else []
        while name in _TEXTS and words and not words[0].startswith("--"):
            values.append(words.pop(0))
        if not values:
            return {FAULT: f"{where} = {option} without a value: must have one"}
        row[name] = " ".join(values)
    if row.get("seed") == "-1":  # AUTOMATIC1111's random seed
        row["seed"] = None
    return row

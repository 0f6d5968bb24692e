"""The prompts of a request as tokens: over time, and between prompt and prompt_b.

A text that changes from step to step is read whole before anything is drawn, so all parts have the
same number of chunks, and a mistake in any of them fails the row at once.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias, TypeVar

from sdbatch import prompt_syntax, samplers
from sdbatch.engine.request import Request
from sdbatch.models.sd1.row_loras import RowLoras
from sdbatch.models.sd1.text import Chunk, Tokenizer, Tokens
from sdbatch.prompt_schedule import Calls, schedule

Schedule: TypeAlias = list[tuple[int, Tokens]]  # each with the last denoiser call it is used in

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Prompts:
    """The text of a request as tokens; all prompts have the same number of chunks."""

    prompt: tuple[Chunk, ...]
    negative: tuple[Chunk, ...]
    tokens: int  # of the longest text that the prompt has over time
    truncated: bool
    loras: tuple[float, ...]  # the weights of the declared LoRAs
    prompt_b: tuple[Chunk, ...] = ()  # which the embedding is mixed with; empty: it is not
    mix: float = 0.0  # the share of prompt_b
    # Where a prompt changes: what it is over time, each with the last denoiser call of it.
    over_time: "tuple[tuple[int, Prompts], ...]" = ()

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        """Return the chunks of all prompts, those of later calls too."""
        later = (chunk for _, each in self.over_time for chunk in each.chunks)
        return (*self.prompt, *self.negative, *self.prompt_b, *later)

    def at(self, tick: int) -> "Prompts":
        """Return the prompts of one denoiser call: equal ones for equal texts.

        Args:
            tick: the calls that were made in this pass before, 0 at first, also from a picture.
        """
        return _find(self.over_time, tick) if self.over_time else self


def _find(entries: Sequence[tuple[int, T]], call: int) -> T:
    """Return what is used in a denoiser call."""
    return entries[bisect_left(entries, call, key=lambda entry: entry[0])][1]


def read_prompts(request: Request, tokenizer: Tokenizer, row_loras: RowLoras) -> Prompts:
    """Return the tokens of the request's prompts.

    Raises:
        ValueError: a prompt or a LoRA cannot be drawn.
    """
    text, chosen = prompt_syntax.choose_loras(request.prompt, request.loras, row_loras.weights)
    texts = {"prompt": text}
    if request.guided:
        texts["negative_prompt"] = request.negative_prompt
    if request.prompt_b:
        texts["prompt_b"] = request.prompt_b
    if row_loras.weights:
        for name in [*texts][1:]:
            prompt_syntax.refuse_tags(name, texts[name])
    schedules = {name: _read(name, text, request, tokenizer) for name, text in texts.items()}
    # At its ends `mix` gives the bits of a single prompt: the other adds no chunks either.
    single = "prompt_b" if "prompt_b" in texts and request.mix == 1 else "prompt"
    used = {"prompt": schedules[single]}
    used["negative_prompt"] = schedules.get("negative_prompt", schedules[single])
    if "prompt_b" in texts and 0 < request.mix < 1:
        used["prompt_b"] = schedules["prompt_b"]
    loras = row_loras.vector(chosen)
    blank = replace(tokenizer.blank_chunk(request.clip_skip), loras=row_loras.in_text(loras))
    return _join(used, blank, loras, request.mix)


def _read(name: str, text: str, request: Request, tokenizer: Tokenizer) -> Schedule:
    """Return the tokens of one prompt over time."""
    options = {"weighted": request.prompt_weights, "chunked": request.chunk_prompts}
    per_step = samplers.split(request.sampler)[0].calls_per_step
    count = request.num_inference_steps * per_step
    calls = Calls(count, request.first_steps * per_step)
    try:
        texts = schedule(text, calls) if request.prompt_weights else [(count, text)]
        return [
            (end, tokenizer.tokenize(each, request.clip_skip, **options)) for end, each in texts
        ]
    except ValueError as error:
        raise ValueError(f"{name} = {error}") from error


def _join(
    schedules: Mapping[str, Schedule], blank: Chunk, loras: tuple[float, ...], mix: float
) -> Prompts:
    """Join the prompts of a request, each padded with `blank`, whose LoRAs all chunks get."""
    everything = [tokens for each in schedules.values() for _, tokens in each]
    chunks = max(len(tokens.chunks) for tokens in everything)
    count = max(
        tokens.count
        for name, each in schedules.items()
        if name != "negative_prompt"
        for _, tokens in each
    )
    truncated = any(tokens.truncated for tokens in everything)

    def pad(name: str, call: int) -> tuple[Chunk, ...]:
        tokens = _find(schedules[name], call)
        own = [replace(chunk, loras=blank.loras) for chunk in tokens.chunks]
        return (*own, *[blank] * (chunks - len(own)))

    found: dict[Prompts, Prompts] = {}
    over_time: list[tuple[int, Prompts]] = []
    for end in sorted({end for each in schedules.values() for end, _ in each}):
        prompt, negative = pad("prompt", end), pad("negative_prompt", end)
        between = (pad("prompt_b", end), mix) if "prompt_b" in schedules else ()
        prompts = Prompts(prompt, negative, count, truncated, loras, *between)
        over_time.append((end, found.setdefault(prompts, prompts)))
    first = over_time[0][1]
    return replace(first, over_time=tuple(over_time)) if len(found) > 1 else first

"""Prompts to embeddings: CLIP's text encoder in fixed-size groups, with a cache.

B = prompts, L = 77 text tokens, D = text width (768 for SD 1.5).
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

GROUP = 8  # prompts a call of the text encoder: always so many, padded, so that bits never differ
CACHED = 512  # prompts kept; an embedding of SD 1.5 is 231 KiB in float32


@dataclass(frozen=True, slots=True)
class Text:
    """A prompt as the UNet takes it."""

    embedding: torch.Tensor  # (L, D)
    tokens: int  # without the begin and end marks, before truncation
    truncated: bool


class TextEncoder:
    """Encodes prompts; a prompt's embedding does not depend on those encoded beside it."""

    def __init__(self, tokenizer: Any, encoder: Any) -> None:
        self._tokenizer = tokenizer
        self._encoder = encoder
        self._cache: OrderedDict[str, Text] = OrderedDict()

    def encode(self, prompts: Sequence[str]) -> list[Text]:
        """Return the embeddings of `prompts`, in order. Under torch.inference_mode only."""
        found = {prompt: self._cache[prompt] for prompt in prompts if prompt in self._cache}
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in found]
        for start in range(0, len(new), GROUP):
            group = new[start : start + GROUP]
            found |= zip(group, self._encode_group(group), strict=True)
        for prompt, text in found.items():
            self._cache[prompt] = text
            self._cache.move_to_end(prompt)
        while len(self._cache) > CACHED:
            self._cache.popitem(last=False)
        return [found[prompt] for prompt in prompts]

    def _encode_group(self, prompts: list[str]) -> list[Text]:
        length = self._tokenizer.model_max_length
        end, pad = self._tokenizer.eos_token_id, self._tokenizer.pad_token_id
        rows, counts = [], []
        for prompt in prompts:
            ids = self._tokenizer(prompt, truncation=False, verbose=False).input_ids
            counts.append(len(ids) - 2)
            kept = ids if len(ids) <= length else [*ids[: length - 1], end]
            rows.append(kept + [pad] * (length - len(kept)))
        rows += [rows[0]] * (GROUP - len(rows))
        device = next(self._encoder.parameters()).device
        embeddings = self._encoder(torch.tensor(rows, device=device))[0]  # (GROUP, L, D)
        return [
            Text(embeddings[i].clone(), count, count > length - 2) for i, count in enumerate(counts)
        ]

"""Prompts to embeddings: tokens in chunks of 77, and CLIP's text encoder in fixed-size groups.

L = 77 text tokens of a chunk, D = text width (768 for SD 1.5).
"""

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any

import torch

from sdbatch.engine.cuda import moved
from sdbatch.models.sd1 import prompt_weights

GROUP = 8  # chunks a call of the text encoder: always so many, padded, so that bits never differ
AHEAD = 64  # chunks that are looked at to fill a group
NOISE = 1e-4  # of the mean size: a mean below is rounding, as an untrained layer norm's is
CACHED = 512  # chunks kept; an embedding of SD 1.5 is 231 KiB in float32


@dataclass(frozen=True, slots=True)
class Chunk:
    """The tokens of a prompt or a part of one, as the text encoder takes them."""

    ids: tuple[int, ...]  # L
    weights: tuple[float, ...] | None  # L; None: all 1
    clip_skip: int


@dataclass(frozen=True, slots=True)
class Tokens:
    """A prompt as tokens."""

    chunks: tuple[Chunk, ...]
    count: int  # without the begin and end marks, before truncation
    truncated: bool


class Tokenizer:
    """Cuts prompts into tokens; may be called from any thread."""

    def __init__(self, tokenizer: Any, *, has_embeddings: bool = False) -> None:
        self._tokenizer = tokenizer
        self._vectors = _vectors(tokenizer) if has_embeddings else {}
        self._lock = threading.Lock()  # a call sets and resets padding inside the tokenizer
        self.read = lru_cache(CACHED)(self._read)

    def _read(self, prompt: str, clip_skip: int, *, weighted: bool, chunked: bool) -> Tokens:
        """Return the tokens of `prompt`.

        Raises:
            ValueError: `weighted`, and the prompt holds syntax that is not drawn.
        """
        parts = prompt_weights.parse(prompt) if weighted else [(prompt, 1.0)]
        ids: list[int] = []
        weights: list[float] = []
        for text, weight in parts:
            part = self._ids(text)
            ids += part
            weights += [weight] * len(part)
        room = self._tokenizer.model_max_length - 2
        last = max(len(ids), 1) if chunked else 1
        chunks = tuple(
            self._chunk(ids[i : i + room], weights[i : i + room], clip_skip)
            for i in range(0, last, room)
        )
        return Tokens(chunks, len(ids), not chunked and len(ids) > room)

    def blank(self, clip_skip: int) -> Chunk:
        """Return the chunk of no prompt: what a shorter prompt is filled up with."""
        return self.read("", clip_skip, weighted=False, chunked=False).chunks[0]

    def _ids(self, text: str) -> list[int]:
        with self._lock:
            found = self._tokenizer(text, truncation=False, verbose=False).input_ids
        return [part for token in found[1:-1] for part in self._vectors.get(token, (token,))]

    def _chunk(self, ids: list[int], weights: list[float], clip_skip: int) -> Chunk:
        tokenizer = self._tokenizer
        filled = tokenizer.model_max_length - len(ids) - 2
        row = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
        row += [tokenizer.pad_token_id] * filled
        plain = all(weight == 1.0 for weight in weights)
        return Chunk(
            tuple(row), None if plain else (1.0, *weights, *[1.0] * (filled + 1)), clip_skip
        )


def _vectors(tokenizer: Any) -> dict[int, list[int]]:
    """Return the tokens that each word of several vectors stands for.

    diffusers names them word, word_1, word_2, ... Its own expansion replaces text in the order of
    a set, which differs from process to process where one word begins with another.
    """
    added: dict[str, int] = tokenizer.added_tokens_encoder
    found: dict[int, list[int]] = {}
    for word, token in added.items():
        found[token] = [token]
        while (following := f"{word}_{len(found[token])}") in added:
            found[token].append(added[following])
    return found


class TextEncoder:
    """Encodes chunks; an embedding does not depend on those encoded beside it."""

    def __init__(self, encoder: Any) -> None:
        self._encoder = encoder
        self._cache: OrderedDict[Chunk, torch.Tensor] = OrderedDict()

    def encode(self, chunks: Sequence[Chunk], soon: Iterable[Chunk] = ()) -> list[torch.Tensor]:
        """Return the embeddings (L, D) of `chunks`, in order. Under torch.inference_mode only.

        Room in the last group goes to those that are asked for `soon`.
        """
        found = {chunk: self._cache[chunk] for chunk in chunks if chunk in self._cache}
        new = [chunk for chunk in dict.fromkeys(chunks) if chunk not in found]
        if room := -len(new) % GROUP:
            later = dict.fromkeys(islice(soon, AHEAD))
            new += islice((c for c in later if c not in self._cache and c not in new), room)
        for start in range(0, len(new), GROUP):
            group = new[start : start + GROUP]
            found |= zip(group, self._encode_group(group), strict=True)
        for chunk, embedding in found.items():
            self._cache[chunk] = embedding
            self._cache.move_to_end(chunk)
        while len(self._cache) > CACHED:
            self._cache.popitem(last=False)
        return [found[chunk] for chunk in chunks]

    def _encode_group(self, chunks: list[Chunk]) -> list[torch.Tensor]:
        rows = [chunk.ids for chunk in chunks]
        rows += [rows[0]] * (GROUP - len(rows))
        ids = moved(torch.tensor(rows), next(self._encoder.parameters()).device)
        states = self._encoder(ids, output_hidden_states=True).hidden_states
        norm = self._encoder.final_layer_norm
        by_skip = {skip: norm(states[-1 - skip]) for skip in {chunk.clip_skip for chunk in chunks}}
        return [
            _weighted(by_skip[chunk.clip_skip][i].clone(), chunk.weights)
            for i, chunk in enumerate(chunks)
        ]


def _weighted(embedding: torch.Tensor, weights: tuple[float, ...] | None) -> torch.Tensor:
    """Scale each token's row and keep the mean of all, as AUTOMATIC1111 does."""
    if weights is None:
        return embedding
    factors = moved(torch.tensor(weights, dtype=torch.float32), embedding.device)
    scaled = embedding.float() * factors[:, None]
    mean, kept = scaled.mean(), embedding.float().mean()
    told = torch.minimum(mean.abs(), kept.abs()) > NOISE * scaled.abs().mean()
    return torch.where(told, scaled * (kept / mean), scaled).to(embedding.dtype)

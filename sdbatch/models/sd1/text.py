"""Prompts to embeddings: tokens in chunks of 77, and CLIP's text encoder in fixed-size groups.

L = 77 text tokens of a chunk, D = text width (768 for SD 1.5).
"""

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any, TypeAlias

import torch

from sdbatch import prompt_syntax
from sdbatch.engine.cuda import moved
from sdbatch.models.sd1.row_loras import RowLoras

GROUP = 8  # chunks in a call of the text encoder: always the same number, as it decides bits
LOOKAHEAD = 64  # chunks of waiting prompts that may fill a group
ROUNDING = 1e-4  # of the mean size: a smaller mean is rounding, as after an untrained layer norm
BACKTRACK = 20  # the last tokens of a full chunk, of which a comma ends it: A1111's default
CACHE_SIZE = 512  # prompts, and chunks; an embedding of SD 1.5 is 231 KiB in float32

Row: TypeAlias = list[tuple[int, float]]  # tokens with their weights


@dataclass(frozen=True, slots=True)
class Chunk:
    """The tokens of a prompt, or of a part of it, as the text encoder takes them."""

    ids: tuple[int, ...]  # L
    weights: tuple[float, ...] | None  # L; None: all are 1
    clip_skip: int
    loras: tuple[float, ...] = ()  # the weights of LoRAs by row, as RowLoras orders them


@dataclass(frozen=True, slots=True)
class Tokens:
    """A prompt as tokens."""

    chunks: tuple[Chunk, ...]
    count: int  # without the begin and end marks, before truncation
    truncated: bool


class Tokenizer:
    """Splits prompts into tokens; may be called from any thread."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._vectors = _tokens_of_words(tokenizer)
        self._comma = tokenizer.get_vocab().get(",</w>")
        self._lock = threading.Lock()  # a call sets and resets padding inside the tokenizer
        self.tokenize = lru_cache(CACHE_SIZE)(self._tokenize)

    def _tokenize(self, prompt: str, clip_skip: int, *, weighted: bool, chunked: bool) -> Tokens:
        """Return the tokens of `prompt`.

        Raises:
            ValueError: `weighted`, and the prompt has syntax that is not supported; or `chunked`,
                and a word has more vectors than a chunk.
        """
        pieces = [[(prompt, 1.0)]]
        if weighted:
            pieces = prompt_syntax.parse_weights(prompt, chunked=chunked)
        pieces_of_words = [self._weighted_words(piece) for piece in pieces]
        if len(pieces) > 1 and not pieces_of_words[-1]:
            del pieces_of_words[-1]  # a BREAK at the end begins no chunk
        words = [word for piece in pieces_of_words for word in piece]
        count = sum(map(len, words))
        room = self._tokenizer.model_max_length - 2
        if chunked:
            self._check_words(words, room)
            rows = [row for piece in pieces_of_words for row in _cut(piece, room, self._comma)]
        else:
            rows = [[each for word in words for each in word][:room]]
        chunks = tuple(self._chunk(row, clip_skip) for row in rows)
        return Tokens(chunks, count, not chunked and count > room)

    def blank_chunk(self, clip_skip: int) -> Chunk:
        """Return the chunk of an empty prompt, which pads a shorter prompt."""
        return self.tokenize("", clip_skip, weighted=False, chunked=False).chunks[0]

    def _weighted_words(self, parts: list[tuple[str, float]]) -> list[Row]:
        """Return the words of a piece of a prompt, a row each."""
        return [
            [(token, weight) for token in word]
            for text, weight in parts
            for word in self._words(text)
        ]

    def _words(self, text: str) -> list[Sequence[int]]:
        """Return the tokens of `text`, those of an added word together."""
        with self._lock:
            ids = self._tokenizer(text, truncation=False, verbose=False).input_ids
        return [self._vectors.get(token, (token,)) for token in ids[1:-1]]

    def _check_words(self, words: list[Row], room: int) -> None:
        for word in words:
            if len(word) > room:
                name = self._tokenizer.convert_ids_to_tokens(word[0][0])
                raise ValueError(
                    f"{name!r}: has {len(word)} vectors: must have at most {room}, the tokens of a "
                    f"chunk. Remove it, or set chunk_prompts: false"
                )

    def _chunk(self, row: Row, clip_skip: int) -> Chunk:
        tokenizer = self._tokenizer
        padding = tokenizer.model_max_length - len(row) - 2
        ids = (tokenizer.bos_token_id, *(token for token, _ in row), tokenizer.eos_token_id)
        ids += (tokenizer.pad_token_id,) * padding
        weights = [weight for _, weight in row]
        plain = all(weight == 1.0 for weight in weights)
        return Chunk(ids, None if plain else (1.0, *weights, *[1.0] * (padding + 1)), clip_skip)


def _cut(words: list[Row], room: int, comma: int | None) -> list[Row]:
    """Return chunks of up to `room` tokens as AUTOMATIC1111 cuts them; none cuts a word.

    What follows a comma moves to the next chunk if the chunk is full, the next word is no comma,
    and the comma is among the chunk's last BACKTRACK tokens. A word that finds room, but not enough
    of it, begins the next chunk alone. No comma counts that begins a chunk after a full one.

    Source: AUTOMATIC1111's modules/sd_hijack_clip.py, `tokenize_line`.
    """
    chunks: list[Row] = []
    chunk: Row = []
    after_comma = 0  # the place behind the chunk's last comma; 0: it has none
    for word in words:
        is_comma = word[0][0] == comma
        full = len(chunk) == room
        if full:
            near = after_comma and room - after_comma < BACKTRACK and not is_comma
            end = after_comma if near else room
            chunks.append(chunk[:end])
            chunk, after_comma = chunk[end:], 0
        if len(chunk) + len(word) > room:
            chunks.append(chunk)
            chunk, after_comma = [], 0
        chunk = chunk + word
        if is_comma and not full:
            after_comma = len(chunk)
    return [*chunks, chunk] if chunk or not chunks else chunks


def _tokens_of_words(tokenizer: Any) -> dict[int, list[int]]:
    """Return the tokens of each added word of several vectors, by its first: one for each.

    Of the job's embeddings, and of those that were saved with the model. diffusers names them word,
    word_1, word_2, ... Its own expansion replaces text in the order of a set, which differs from
    process to process where one word begins with another.
    """
    ids: dict[str, int] = tokenizer.added_tokens_encoder
    tokens: dict[int, list[int]] = {}
    for word, first in ids.items():
        own = [first]
        while (following := f"{word}_{len(own)}") in ids:
            own.append(ids[following])
        if len(own) > 1:
            tokens[first] = own
    return tokens


class TextEncoder:
    """Encodes chunks; an embedding does not depend on the other chunks in its call."""

    def __init__(self, encoder: Any, loras: RowLoras) -> None:
        self._encoder = encoder
        self._loras = loras
        self._cache: OrderedDict[Chunk, torch.Tensor] = OrderedDict()

    def encode(self, chunks: Sequence[Chunk], soon: Iterable[Chunk] = ()) -> list[torch.Tensor]:
        """Return the embeddings (L, D) of `chunks`, in order. Under torch.inference_mode only.

        Free places in the last group go to chunks that are needed `soon`.
        """
        embeddings = {chunk: self._cache[chunk] for chunk in chunks if chunk in self._cache}
        new = [chunk for chunk in dict.fromkeys(chunks) if chunk not in embeddings]
        if free := -len(new) % GROUP:
            later = dict.fromkeys(islice(soon, LOOKAHEAD))
            new += islice((c for c in later if c not in self._cache and c not in new), free)
        for start in range(0, len(new), GROUP):
            group = new[start : start + GROUP]
            embeddings |= zip(group, self._encode_group(group), strict=True)
        for chunk, embedding in embeddings.items():
            self._cache[chunk] = embedding
            self._cache.move_to_end(chunk)
        while len(self._cache) > CACHE_SIZE:
            self._cache.popitem(last=False)
        return [embeddings[chunk] for chunk in chunks]

    def _encode_group(self, chunks: list[Chunk]) -> list[torch.Tensor]:
        rows = chunks + [chunks[0]] * (GROUP - len(chunks))
        device = next(self._encoder.parameters()).device
        ids = moved(torch.tensor([chunk.ids for chunk in rows]), device)
        loras = [chunk.loras for chunk in rows]
        with self._loras.apply(moved(torch.tensor(loras), device) if loras[0] else None):
            states = self._encoder(ids, output_hidden_states=True).hidden_states
            norm, skips = self._encoder.final_layer_norm, {chunk.clip_skip for chunk in chunks}
            by_skip = {skip: norm(states[-1 - skip]) for skip in skips}
        return [
            _apply_weights(by_skip[chunk.clip_skip][i].clone(), chunk.weights)
            for i, chunk in enumerate(chunks)
        ]


def _apply_weights(embedding: torch.Tensor, weights: tuple[float, ...] | None) -> torch.Tensor:
    """Scale each token's row and restore the mean of all, as AUTOMATIC1111 does."""
    if weights is None:
        return embedding
    factors = moved(torch.tensor(weights, dtype=torch.float32), embedding.device)
    scaled = embedding.float() * factors[:, None]
    mean, original = scaled.mean(), embedding.float().mean()
    meaningful = torch.minimum(mean.abs(), original.abs()) > ROUNDING * scaled.abs().mean()
    return torch.where(meaningful, scaled * (original / mean), scaled).to(embedding.dtype)

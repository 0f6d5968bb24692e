"""CLIP's tokenizer with a small vocabulary: each word of a caption is one token.

Any other text is split into smaller tokens, down to bytes, as in the original tokenizer.
"""

import json
import random

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from sdbatch.shapes import captions, world

VOCABULARY_SIZE = 1000  # maximum number of tokens
CAPTION_COUNT = 20_000  # captions that determine the vocabulary
START, END = "<|startoftext|>", "<|endoftext|>"


def build_tokenizer() -> CLIPTokenizer:
    """Build the tokenizer; its vocabulary is a byte-pair encoding of random captions."""
    rng = random.Random("tokens")
    letters = list(bytes_to_unicode().values())
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)]
    )
    tokenizer.train_from_iterator(
        (captions.write_caption(world.random_scene(rng), rng) for _ in range(CAPTION_COUNT)),
        trainers.BpeTrainer(
            vocab_size=VOCABULARY_SIZE - 2,
            special_tokens=[*letters, *(f"{letter}</w>" for letter in letters)],
            end_of_word_suffix="</w>",
            show_progress=False,
        ),
    )
    model = json.loads(tokenizer.to_str())["model"]
    vocabulary = model["vocab"]
    for token in (START, END):
        vocabulary[token] = len(vocabulary)
    merges = [tuple(merge) for merge in model["merges"]]
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)

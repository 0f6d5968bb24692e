"""CLIP's tokenizer with a small vocabulary: each word of the world is one token.

Every other text still has tokens, byte by byte, as with CLIP's own.
"""

import json
import random

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from sdbatch.shapes import captions, world

VOCABULARY = 1000  # tokens at most
SAMPLES = 20_000  # captions that they are learnt from
START, END = "<|startoftext|>", "<|endoftext|>"


def build() -> CLIPTokenizer:
    """Learn the vocabulary by byte-pair encoding of captions."""
    chance = random.Random("tokens")
    letters = list(bytes_to_unicode().values())
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)]
    )
    learner.train_from_iterator(
        (captions.say(world.imagine(chance), chance) for _ in range(SAMPLES)),
        trainers.BpeTrainer(
            vocab_size=VOCABULARY - 2,
            special_tokens=[*letters, *(f"{letter}</w>" for letter in letters)],
            end_of_word_suffix="</w>",
            show_progress=False,
        ),
    )
    learned = json.loads(learner.to_str())["model"]
    vocabulary = learned["vocab"]
    for word in (START, END):
        vocabulary[word] = len(vocabulary)
    merges = [tuple(merge) for merge in learned["merges"]]
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)

"""CLIP's tokenizer from the one file that OpenAI published it as, which the package holds.

Source: https://github.com/openai/CLIP, clip/simple_tokenizer.py: the vocabulary is the bytes, the
bytes as the end of a word, what each merge makes, and two marks.
"""

import gzip
from pathlib import Path

from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

FILE = "bpe_simple_vocab_16e6.txt.gz"
_SIZE = 49408
_MARKS = ("<|startoftext|>", "<|endoftext|>")


def load_tokenizer(file: Path) -> CLIPTokenizer:
    """Return the tokenizer of CLIP and of Stable Diffusion 1.x from its published merges."""
    lines = gzip.decompress(file.read_bytes()).decode().split("\n")
    letters = list(bytes_to_unicode().values())
    count = _SIZE - 2 * len(letters) - len(_MARKS)
    merges = [tuple(line.split()) for line in lines[1 : 1 + count]]  # the first line is a title
    words = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges), *_MARKS]
    vocabulary = {word: number for number, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)

"""The tokenizer: a word of a caption is one token, and any text can be tokenized."""

import random

from sdbatch.shapes import captions, world
from training import tokens


def test_every_word_of_a_caption_is_one_token():
    tokenizer = tokens.build_tokenizer()
    rng = random.Random(1)
    for _ in range(1000):
        prompt = captions.write_caption(world.random_scene(rng), rng)
        parts = tokenizer.tokenize(prompt)
        assert all(part.endswith("</w>") for part in parts), prompt


def test_any_text_can_be_tokenized_and_decoded():
    tokenizer = tokens.build_tokenizer()
    for text in ("a cat", "zwölf boxkämpfer", "二匹の猫 🐈"):
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text

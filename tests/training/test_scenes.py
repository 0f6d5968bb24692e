"""What the networks are shown: nothing that is held out, whatever it is shown in."""

import random

import torch

from sdbatch.shapes import wording, world
from training import scenes, table, tokens


def test_crowds_are_full_of_shapes_of_trained_pairs():
    chance = random.Random(0)
    for _ in range(200):
        group = scenes._group(chance, "red", "large")
        assert not world.is_held_out(group)
        assert group.colour != "red"
    pictures = scenes.crowds("seed", 4)
    assert pictures.shape == (4, 3, 128, 128)
    assert pictures.min() >= -1
    assert pictures.max() <= 1
    assert torch.equal(pictures, scenes.crowds("seed", 4))
    assert not torch.equal(pictures, scenes.crowds("other", 4))


def test_a_mosaic_has_the_same_pixels_elsewhere():
    pictures = scenes.crowds("seed", 4)
    mosaic = scenes.mosaic(pictures, torch.Generator().manual_seed(0))
    assert mosaic.shape == pictures.shape
    assert not torch.equal(mosaic, pictures)
    assert torch.equal(mosaic.flatten().sort().values, pictures.flatten().sort().values)


def test_every_word_of_the_world_is_one_token():
    tokenizer = tokens.build()
    chance = random.Random(1)
    for _ in range(1000):
        prompt = wording.say(world.imagine(chance), chance)
        parts = tokenizer.tokenize(prompt)
        assert [part for part in parts if not part.endswith("</w>")] == [], prompt


def test_any_text_has_tokens_and_comes_back():
    tokenizer = tokens.build()
    for text in ("a cat", "zwölf boxkämpfer", "二匹の猫 🐈"):
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text


def test_the_prompt_table_is_made_by_the_committed_code():
    made = table.rows(20, "table")
    assert made == table.rows(20, "table")
    assert made.column_names[:2] == ["id", "prompt"]
    assert len(set(made["id"].to_pylist())) == 20

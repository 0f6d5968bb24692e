"""What the networks are shown: nothing that is held out, whatever it is shown in."""

import random

import torch

from sdbatch.shapes import captions, parse, world
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


def test_tiles_have_the_pixels_of_the_pictures():
    pictures = scenes.crowds("seed", 3)
    tiles = scenes.tiles(pictures, torch.Generator().manual_seed(0))
    assert tiles.shape == (12, 3, 64, 64)
    assert torch.equal(tiles.flatten().sort().values, pictures.flatten().sort().values)


def test_every_word_of_the_world_is_one_token():
    tokenizer = tokens.build()
    chance = random.Random(1)
    for _ in range(1000):
        prompt = captions.say(world.imagine(chance), chance)
        parts = tokenizer.tokenize(prompt)
        assert [part for part in parts if not part.endswith("</w>")] == [], prompt


def test_any_text_has_tokens_and_comes_back():
    tokenizer = tokens.build()
    for text in ("a cat", "zwölf boxkämpfer", "二匹の猫 🐈"):
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text


def test_the_prompt_table_follows_its_seed_and_labels_what_its_prompts_ask_for():
    made = table.rows(100, "table")
    assert made == table.rows(100, "table")
    assert made != table.rows(100, "other")
    assert made.column_names[:2] == ["id", "prompt"]
    assert len(set(made["id"].to_pylist())) == 100
    for row in made.to_pylist():
        asked = parse.asked(row["prompt"])
        first = asked.groups[0]
        assert (first.shape, first.colour, first.count) == (
            row["shape"],
            row["colour"],
            row["count"],
        )
        assert len(asked.groups) == row["groups"]
        assert asked.background in (row["background"], None)

"""The training data: pictures without held-out pairs, tokens and the prompt table."""

import random

import torch

from sdbatch.shapes import captions, parse, world
from training import scenes, table, tokens


def test_crowded_pictures_have_no_held_out_pair():
    rng = random.Random(0)
    for _ in range(200):
        group = scenes._random_group(rng, "red", "large")
        assert not world.is_held_out(group)
        assert group.colour != "red"
    pictures = scenes.render_crowds("seed", 4)
    assert pictures.shape == (4, 3, 128, 128)
    assert pictures.min() >= -1
    assert pictures.max() <= 1
    assert torch.equal(pictures, scenes.render_crowds("seed", 4))
    assert not torch.equal(pictures, scenes.render_crowds("other", 4))


def test_tiles_have_the_pixels_of_their_pictures():
    pictures = scenes.render_crowds("seed", 3)
    tiles = scenes.cut_tiles(pictures, torch.Generator().manual_seed(0))
    assert tiles.shape == (12, 3, 64, 64)
    assert torch.equal(tiles.flatten().sort().values, pictures.flatten().sort().values)


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


def test_the_prompt_table_depends_only_on_its_seed_and_its_labels_match_its_prompts():
    prompts = table.prompt_table(100, "table")
    assert prompts == table.prompt_table(100, "table")
    assert prompts != table.prompt_table(100, "other")
    assert prompts.column_names[:2] == ["id", "prompt"]
    assert len(set(prompts["id"].to_pylist())) == 100
    for row in prompts.to_pylist():
        scene = parse.parse_prompt(row["prompt"])
        first = scene.groups[0]
        assert (first.shape, first.colour, first.count) == (
            row["shape"],
            row["colour"],
            row["count"],
        )
        assert len(scene.groups) == row["groups"]
        assert scene.background in (row["background"], None)

"""The judge: right on rendered truth, and not fooled by pictures that are wrong."""

import random
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from sdbatch.shapes import picture, world
from sdbatch.shapes.judge import ATTRIBUTES, compare, fidelity, judge
from sdbatch.shapes.vision import Sight, Thing, look
from sdbatch.shapes.world import Group, Scene

TRUTHS = 1500


def shares(scenes, pictures):
    """Return the part of the scenes for which each attribute is judged to hold."""
    verdicts = [
        compare(scene, look(pixels)) for scene, pixels in zip(scenes, pictures, strict=True)
    ]
    asked = {name: [v[name] for v in verdicts if v[name] is not None] for name in ATTRIBUTES}
    return {name: sum(held) / len(held) for name, held in asked.items()}


@pytest.fixture(scope="module")
def truth():
    chance = random.Random(8)
    scenes = [world.imagine(chance) for _ in range(TRUTHS)]
    return scenes, [picture.render(scene, chance) for scene in scenes]


def test_the_judge_is_right_on_rendered_truth(truth):
    assert min(shares(*truth).values()) >= 0.99


def test_the_judge_is_right_on_truth_that_was_blurred_or_went_through_a_jpeg_file(truth, tmp_path):
    scenes, pictures = (part[:300] for part in truth)
    spoiled = []
    for pixels in pictures:
        image = Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(0.7))
        image.save(tmp_path / "one.jpg", quality=85)
        spoiled.append(np.asarray(Image.open(tmp_path / "one.jpg")))
    assert min(shares(scenes, spoiled).values()) >= 0.95


def test_the_judge_reads_pictures_of_other_sizes(truth):
    scenes, pictures = (part[:100] for part in truth)
    larger = [np.asarray(Image.fromarray(pixels).resize((512, 512))) for pixels in pictures]
    assert min(shares(scenes, larger).values()) >= 0.97


def test_pictures_of_other_scenes_are_judged_to_be_wrong(truth):
    scenes, pictures = truth
    wrong = shares(scenes, [*pictures[1:], pictures[0]])
    assert wrong["background"] < 0.2
    assert wrong["colour"] < 0.2
    assert wrong["shape"] < 0.2
    assert wrong["count"] < 0.5
    assert wrong["position"] < 0.5


@pytest.mark.parametrize("pixels", [0, 127, 255, None])
def test_a_picture_with_nothing_in_it_or_noise_is_read_without_error(pixels):
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    empty = noise if pixels is None else np.full_like(noise, pixels)
    verdict = judge("a red circle above a blue square on a green background", empty)
    assert not any(verdict[name] for name in ("colour", "shape", "count", "position"))


ASKED = Scene(
    groups=(
        Group(shape="star", colour="red", count=2, size="small", texture="plain"),
        Group(shape="ring", colour="blue", count=1, size="large", texture="striped"),
    ),
    background="white",
    background_texture="plain",
    relation="above",
)
STARS = tuple(Thing("star", "red", "small", "plain", x, 0.2) for x in (0.2, 0.7))
RING = Thing("ring", "blue", "large", "striped", 0.5, 0.7)
SEEN = Sight("white", "plain", (*STARS, RING))


@pytest.mark.parametrize(
    ("name", "sight"),
    [
        ("background", replace(SEEN, background="gray")),
        ("colour", replace(SEEN, things=(*STARS, replace(RING, colour="green")))),
        ("shape", replace(SEEN, things=(STARS[0], replace(STARS[1], shape="moon"), RING))),
        ("count", replace(SEEN, things=(*STARS, RING, STARS[0]))),
        ("position", replace(SEEN, things=(*STARS, replace(RING, y=0.22)))),
        ("position", replace(SEEN, things=(STARS[0], replace(STARS[1], y=0.8), RING))),
        ("size", replace(SEEN, things=(*STARS, replace(RING, size="medium")))),
        ("texture", replace(SEEN, things=(*STARS, replace(RING, texture="plain")))),
        ("texture", replace(SEEN, background_texture="checked")),
    ],
)
def test_one_fault_makes_one_attribute_wrong(name, sight):
    assert set(compare(ASKED, SEEN).values()) == {True}
    verdict = compare(ASKED, sight)
    assert [attribute for attribute, holds in verdict.items() if not holds] == [name]
    assert fidelity(verdict) == pytest.approx(1 - 1 / len(ATTRIBUTES))


def test_all_of_a_group_must_be_where_it_is_asked_for():
    asked = Scene(groups=(Group(shape="star", colour="red"),), place="top")
    low = replace(STARS[0], x=0.5, y=0.7)
    assert compare(asked, replace(SEEN, things=STARS))["position"]
    assert not compare(asked, replace(SEEN, things=(*STARS, low)))["position"]


def test_a_missing_group_is_wrong_in_all_that_is_asked_of_it():
    verdict = compare(ASKED, replace(SEEN, things=STARS))
    wrong = {name for name, holds in verdict.items() if not holds}
    assert wrong == {"colour", "shape", "count", "position", "size", "texture"}


def test_what_a_prompt_leaves_open_is_not_judged():
    pixels = picture.render(
        Scene(
            groups=(Group(shape="star", colour="red", count=1, size="large", texture="plain"),),
            background="white",
            background_texture="plain",
        ),
        random.Random(9),
    )
    verdict = judge("a red star", pixels)
    assert {name for name, holds in verdict.items() if holds is None} == {
        "background",
        "position",
        "size",
        "texture",
    }
    assert fidelity(verdict) == 1
    assert judge("a red dog", pixels) is None

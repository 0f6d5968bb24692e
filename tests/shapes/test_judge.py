"""The judge: it accepts correct pictures, and rejects wrong ones."""

import random
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from sdbatch.shapes import picture, world
from sdbatch.shapes.judge import ATTRIBUTES, compare_scene, fidelity, judge_picture
from sdbatch.shapes.vision import DetectedShape, PictureContent, read_picture
from sdbatch.shapes.world import Group, Scene

SCENE_COUNT = 1500


def pass_rates(scenes, pictures):
    """Return for each attribute the fraction of the scenes for which it holds."""
    verdicts = [
        compare_scene(scene, read_picture(pixels))
        for scene, pixels in zip(scenes, pictures, strict=True)
    ]
    results = {name: [v[name] for v in verdicts if v[name] is not None] for name in ATTRIBUTES}
    return {name: sum(values) / len(values) for name, values in results.items()}


@pytest.fixture(scope="module")
def ground_truth():
    rng = random.Random(8)
    scenes = [world.random_scene(rng) for _ in range(SCENE_COUNT)]
    return scenes, [picture.render(scene, rng) for scene in scenes]


def test_the_judge_accepts_rendered_pictures(ground_truth):
    assert min(pass_rates(*ground_truth).values()) >= 0.99


def test_the_judge_accepts_blurred_jpeg_pictures(ground_truth, tmp_path):
    scenes, pictures = (items[:300] for items in ground_truth)
    jpegs = []
    for pixels in pictures:
        image = Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(0.7))
        image.save(tmp_path / "picture.jpg", quality=85)
        jpegs.append(np.asarray(Image.open(tmp_path / "picture.jpg")))
    assert min(pass_rates(scenes, jpegs).values()) >= 0.95


def test_the_judge_reads_pictures_of_other_sizes(ground_truth):
    scenes, pictures = (items[:100] for items in ground_truth)
    larger = [np.asarray(Image.fromarray(pixels).resize((512, 512))) for pixels in pictures]
    assert min(pass_rates(scenes, larger).values()) >= 0.97


def test_the_judge_rejects_pictures_of_other_scenes(ground_truth):
    scenes, pictures = ground_truth
    rates = pass_rates(scenes, [*pictures[1:], pictures[0]])
    assert rates["background"] < 0.2
    assert rates["colour"] < 0.2
    assert rates["shape"] < 0.2
    assert rates["count"] < 0.5
    assert rates["position"] < 0.5


@pytest.mark.parametrize("value", [0, 127, 255, None])
def test_an_empty_or_noisy_picture_has_no_requested_group(value):
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    pixels = noise if value is None else np.full_like(noise, value)
    verdict = judge_picture("a red circle above a blue square on a green background", pixels)
    assert not any(verdict[name] for name in ("colour", "shape", "count", "position"))


SCENE = Scene(
    groups=(
        Group(shape="star", colour="red", count=2, size="small", texture="plain"),
        Group(shape="ring", colour="blue", count=1, size="large", texture="striped"),
    ),
    background="white",
    background_texture="plain",
    relation="above",
)
STARS = tuple(DetectedShape("star", "red", "small", "plain", x, 0.2) for x in (0.2, 0.7))
RING = DetectedShape("ring", "blue", "large", "striped", 0.5, 0.7)
CONTENT = PictureContent("white", "plain", (*STARS, RING))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("background", replace(CONTENT, background="gray")),
        ("colour", replace(CONTENT, shapes=(*STARS, replace(RING, colour="green")))),
        ("shape", replace(CONTENT, shapes=(STARS[0], replace(STARS[1], shape="moon"), RING))),
        ("count", replace(CONTENT, shapes=(*STARS, RING, STARS[0]))),
        ("position", replace(CONTENT, shapes=(*STARS, replace(RING, y=0.22)))),
        ("position", replace(CONTENT, shapes=(STARS[0], replace(STARS[1], y=0.8), RING))),
        ("size", replace(CONTENT, shapes=(*STARS, replace(RING, size="medium")))),
        ("texture", replace(CONTENT, shapes=(*STARS, replace(RING, texture="plain")))),
        ("texture", replace(CONTENT, background_texture="checked")),
    ],
)
def test_one_difference_fails_one_attribute(name, content):
    assert set(compare_scene(SCENE, CONTENT).values()) == {True}
    verdict = compare_scene(SCENE, content)
    assert [attribute for attribute, holds in verdict.items() if not holds] == [name]
    assert fidelity(verdict) == pytest.approx(1 - 1 / len(ATTRIBUTES))


def test_all_shapes_of_a_group_must_be_in_its_place():
    scene = Scene(groups=(Group(shape="star", colour="red"),), place="top")
    low_star = replace(STARS[0], x=0.5, y=0.7)
    assert compare_scene(scene, replace(CONTENT, shapes=STARS))["position"]
    with_low_star = replace(CONTENT, shapes=(*STARS, low_star))
    assert not compare_scene(scene, with_low_star)["position"]


def test_a_missing_group_fails_all_its_attributes():
    verdict = compare_scene(SCENE, replace(CONTENT, shapes=STARS))
    failures = {name for name, holds in verdict.items() if not holds}
    assert failures == {"colour", "shape", "count", "position", "size", "texture"}


def test_attributes_that_a_prompt_leaves_open_are_not_judged():
    pixels = picture.render(
        Scene(
            groups=(Group(shape="star", colour="red", count=1, size="large", texture="plain"),),
            background="white",
            background_texture="plain",
        ),
        random.Random(9),
    )
    verdict = judge_picture("a red star", pixels)
    assert {name for name, holds in verdict.items() if holds is None} == {
        "background",
        "position",
        "size",
        "texture",
    }
    assert fidelity(verdict) == 1
    assert judge_picture("a red dog", pixels) is None

"""Prompts as users write them: which scene they describe, if any."""

import pytest

from sdbatch.shapes.parse import parse_prompt
from sdbatch.shapes.world import Group, Scene

RED = Group(shape="circle", colour="red", count=1)
GREEN = Group(shape="square", colour="green", count=1, size="large")


@pytest.mark.parametrize(
    ("prompt", "scene"),
    [
        ("a red circle", Scene(groups=(RED,))),
        ("Red circle!", Scene(groups=(RED,))),
        ("a red circle on blue", Scene(groups=(RED,), background="blue")),
        (
            "blue background, red ball, top left",
            Scene(groups=(RED,), background="blue", place="top left"),
        ),
        (
            "a red disc to the left of a large green box on a checkered grey backdrop",
            Scene(
                groups=(RED, GREEN),
                background="gray",
                background_texture="checked",
                relation="left of",
            ),
        ),
        (
            "a red circle at the top and a large green square at the bottom",
            Scene(groups=(RED, GREEN), relation="above"),
        ),
        ("red circles", Scene(groups=(Group(shape="circle", colour="red"),))),
        (
            "2 tiny hearts with dots",
            Scene(groups=(Group(shape="heart", count=2, size="small", texture="spotted"),)),
        ),
        ("a shiny red metal circle, please", Scene(groups=(RED,))),
        ("red, round circle", Scene(groups=(RED,))),
        ("a (red:1.3) circle on a [blue] background", Scene(groups=(RED,), background="blue")),
    ],
)
def test_typical_user_prompts_are_parsed(prompt, scene):
    assert parse_prompt(prompt) == scene


@pytest.mark.parametrize(
    "prompt", ["", " ", "a photo of a cat", "red, blue and green", "二匹の猫 🐈"]
)
def test_a_prompt_without_a_known_shape_has_no_scene(prompt):
    assert parse_prompt(prompt) is None

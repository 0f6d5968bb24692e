"""What the text encoder learns to tell: the same of a scene, however it is said."""

from dataclasses import replace

import torch

from sdbatch.shapes import world
from sdbatch.shapes.world import Group, Scene
from training import text_encoder
from training.text_encoder import UNTOLD, VALUES

STAR = Group(shape="star", colour="red", count=2, size="small", texture="plain")
RING = Group(shape="ring", colour="blue", count=1, size="large", texture="striped")
SCENE = Scene(
    groups=(STAR, RING), background="white", background_texture="checked", relation="above"
)


def told(scene):
    """Return the values that a scene's attributes stand for."""
    numbers = text_encoder.attributes(scene)
    pairs = zip(VALUES, numbers, strict=True)
    return [None if number == UNTOLD else list(values)[number] for values, number in pairs]


def test_the_attributes_are_those_of_the_upper_and_of_the_lower_group():
    assert told(SCENE) == [
        *("star", "red", 2, "small", "plain"),
        *("ring", "blue", 1, "large", "striped"),
        *("above", "white", "checked"),
    ]


def test_a_relation_said_the_other_way_round_is_told_the_same():
    said = replace(SCENE, groups=(RING, STAR), relation="below")
    assert told(said) == told(SCENE)
    beside, turned = (replace(said, relation=side) for side in ("right of", "left of"))
    assert told(beside) == told(replace(SCENE, relation="left of"))
    assert told(turned) != told(beside)


def test_of_a_group_that_is_alone_there_is_no_second():
    alone = replace(SCENE, groups=(STAR,), relation=None, place="top left")
    assert told(alone) == [
        *("star", "red", 2, "small", "plain"),
        *("absent", None, None, None, None),
        *("top left", "white", "checked"),
    ]


def test_a_pair_that_training_never_shows_is_no_wrong_answer():
    asked = torch.tensor([text_encoder.attributes(SCENE)])
    found = [torch.zeros(1, len(values), requires_grad=True) for values in VALUES]
    text_encoder._difference(list(found), asked).backward()
    shapes, colours = (part.grad[0] for part in found[:2])
    unlearnt = (
        {shape for shape, gradient in zip(world.SHAPES, shapes, strict=False) if not gradient},
        {colour for colour, gradient in zip(world.COLOURS, colours, strict=True) if not gradient},
    )
    assert unlearnt == (
        {shape for shape in world.SHAPES if world.is_held_out(replace(STAR, shape=shape))},
        {colour for colour in world.COLOURS if world.is_held_out(replace(STAR, colour=colour))},
    )
    assert all(unlearnt)

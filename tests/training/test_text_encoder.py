"""The targets of the text encoder: equal scenes have equal attributes."""

from dataclasses import replace

import torch

from sdbatch.shapes import world
from sdbatch.shapes.world import Group, Scene
from training import text_encoder
from training.text_encoder import IGNORE_INDEX, SCENE_VALUES

STAR = Group(shape="star", colour="red", count=2, size="small", texture="plain")
RING = Group(shape="ring", colour="blue", count=1, size="large", texture="striped")
SCENE = Scene(
    groups=(STAR, RING), background="white", background_texture="checked", relation="above"
)


def attribute_values(scene):
    """Return the values of a scene's attributes, None for those that the loss ignores."""
    indices = text_encoder.attribute_indices(scene)
    pairs = zip(SCENE_VALUES, indices, strict=True)
    return [None if index == IGNORE_INDEX else list(values)[index] for values, index in pairs]


def test_the_attributes_of_the_upper_group_come_before_those_of_the_lower_group():
    assert attribute_values(SCENE) == [
        *("star", "red", 2, "small", "plain"),
        *("ring", "blue", 1, "large", "striped"),
        *("above", "white", "checked"),
    ]


def test_a_reversed_relation_has_the_same_attributes():
    mirror_image = replace(SCENE, groups=(RING, STAR), relation="below")
    assert attribute_values(mirror_image) == attribute_values(SCENE)
    right, left = (replace(mirror_image, relation=side) for side in ("right of", "left of"))
    assert attribute_values(right) == attribute_values(replace(SCENE, relation="left of"))
    assert attribute_values(left) != attribute_values(right)


def test_the_second_group_of_a_single_group_scene_is_absent():
    single = replace(SCENE, groups=(STAR,), relation=None, place="top left")
    assert attribute_values(single) == [
        *("star", "red", 2, "small", "plain"),
        *("absent", None, None, None, None),
        *("top left", "white", "checked"),
    ]


def test_the_loss_does_not_count_held_out_pairs_as_wrong_answers():
    targets = torch.tensor([text_encoder.attribute_indices(SCENE)])
    logits = [torch.zeros(1, len(values), requires_grad=True) for values in SCENE_VALUES]
    text_encoder._attribute_loss(list(logits), targets).backward()
    shapes, colours = (tensor.grad[0] for tensor in logits[:2])
    without_gradient = (
        {shape for shape, gradient in zip(world.SHAPES, shapes, strict=False) if not gradient},
        {colour for colour, gradient in zip(world.COLOURS, colours, strict=True) if not gradient},
    )
    assert without_gradient == (
        {shape for shape in world.SHAPES if world.is_held_out(replace(STAR, shape=shape))},
        {colour for colour in world.COLOURS if world.is_held_out(replace(STAR, colour=colour))},
    )
    assert all(without_gradient)

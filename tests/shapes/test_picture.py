"""Pictures of scenes: every shape is complete, separate and in its colour."""

import math
import random

import numpy as np
import pytest

from sdbatch.shapes import picture, world
from sdbatch.shapes.picture import MIN_GAP, PICTURE_SIZE
from sdbatch.shapes.world import COLOURS, Group, Scene


def scene(count=1, background_texture="plain", place=None, relation=None, **group):
    values = {"shape": "circle", "colour": "red", "size": "large", "texture": "plain", **group}
    return Scene(
        groups=(Group(count=count, **values),),
        background="white",
        background_texture=background_texture,
        place=place,
        relation=relation,
    )


def coverage(pixels, colour, tone=0):
    """Return the fraction of the pixels that have this tone of a colour."""
    return (pixels == COLOURS[colour][tone]).all(-1).mean()


def test_a_picture_depends_only_on_the_scene_and_the_seed():
    first, second, other = (picture.render(scene(), random.Random(seed)) for seed in (1, 1, 2))
    assert first.shape == (PICTURE_SIZE, PICTURE_SIZE, 3)
    assert first.dtype == np.uint8
    assert (first == second).all()
    assert (first != other).any()


@pytest.mark.parametrize("shape", world.SHAPES)
def test_every_shape_fills_much_of_its_bounding_circle_and_nothing_outside(shape):
    for spot in (picture.Spot(64.0, 64.0, 25.0), picture.Spot(40.3, 70.8, 12.0)):
        group = scene(shape=shape).groups[0]
        pixels = picture.paint("white", "plain", [(group, spot)])
        rows, columns = np.mgrid[0:PICTURE_SIZE, 0:PICTURE_SIZE] + 0.5
        outside = np.hypot(rows - spot.y, columns - spot.x) > 1.1 * spot.radius + 1
        assert (pixels[outside] == COLOURS["white"][0]).all()
        area = (pixels != COLOURS["white"][0]).any(-1).sum()
        assert area > 0.25 * math.pi * spot.radius**2


def test_shapes_neither_touch_nor_cross_the_border():
    rng = random.Random(3)
    for _ in range(300):
        random_scene = world.random_scene(rng)
        groups = picture.arrange(random_scene, rng)
        assert [len(spots) for spots in groups] == [group.count for group in random_scene.groups]
        spots = [spot for spots in groups for spot in spots]
        for number, spot in enumerate(spots):
            for center in (spot.x, spot.y):
                assert spot.radius <= center <= PICTURE_SIZE - spot.radius
            for other in spots[:number]:
                distance = math.dist((spot.x, spot.y), (other.x, other.y))
                assert distance > spot.radius + other.radius + MIN_GAP


@pytest.mark.parametrize("place", world.PLACES)
def test_a_group_is_inside_its_place(place):
    left, top, right, bottom = (fraction * PICTURE_SIZE for fraction in world.PLACES[place])
    rng = random.Random(4)
    for _ in range(20):
        ((spot,),) = picture.arrange(scene(place=place), rng)
        assert left < spot.x < right
        assert top < spot.y < bottom


@pytest.mark.parametrize("texture", ["striped", "checked"])
def test_a_textured_background_is_half_in_the_darker_tone(texture):
    pixels = picture.paint("blue", texture, [])
    assert coverage(pixels, "blue") == pytest.approx(0.5, abs=0.01)
    assert coverage(pixels, "blue", tone=1) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("texture", ["striped", "spotted"])
def test_a_textured_shape_has_both_tones_and_a_plain_shape_has_one(texture):
    spot = picture.Spot(64.0, 64.0, 25.0)
    plain, textured = (
        picture.paint("white", "plain", [(scene(texture=kind).groups[0], spot)])
        for kind in ("plain", texture)
    )
    assert coverage(plain, "red", tone=1) == 0
    assert coverage(textured, "red", tone=1) > 0.15 * coverage(plain, "red")
    assert coverage(textured, "red") > 0.15 * coverage(plain, "red")

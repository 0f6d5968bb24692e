"""Pictures of scenes: everything is there, whole, apart and in its colour."""

import math
import random

import numpy as np
import pytest

from sdbatch.shapes import picture, world
from sdbatch.shapes.picture import GAP, SIZE
from sdbatch.shapes.world import COLOURS, Group, Scene


def scene(count=1, background_texture="plain", place=None, relation=None, **group):
    given = {"shape": "circle", "colour": "red", "size": "large", "texture": "plain", **group}
    return Scene(
        groups=(Group(count=count, **given),),
        background="white",
        background_texture=background_texture,
        place=place,
        relation=relation,
    )


def share(pixels, colour, tone=0):
    return (pixels == COLOURS[colour][tone]).all(-1).mean()


def test_a_picture_is_a_function_of_the_scene_and_the_seed():
    asked = scene()
    one, same, other = (picture.render(asked, random.Random(seed)) for seed in (1, 1, 2))
    assert one.shape == (SIZE, SIZE, 3)
    assert one.dtype == np.uint8
    assert (one == same).all()
    assert (one != other).any()


@pytest.mark.parametrize("shape", world.SHAPES)
def test_every_shape_fills_a_good_part_of_its_circle_and_nothing_outside(shape):
    for spot in (picture.Spot(64.0, 64.0, 25.0), picture.Spot(40.3, 70.8, 12.0)):
        group = scene(shape=shape).groups[0]
        pixels = picture.paint("white", "plain", [(group, spot)])
        rows, columns = np.mgrid[0:SIZE, 0:SIZE] + 0.5
        outside = np.hypot(rows - spot.y, columns - spot.x) > 1.1 * spot.radius + 1
        assert (pixels[outside] == COLOURS["white"][0]).all()
        area = (pixels != COLOURS["white"][0]).any(-1).sum()
        assert area > 0.25 * math.pi * spot.radius**2


def test_nothing_touches_and_nothing_is_cut_off():
    chance = random.Random(3)
    for _ in range(300):
        asked = world.imagine(chance)
        groups = picture.arrange(asked, chance)
        assert [len(spots) for spots in groups] == [group.count for group in asked.groups]
        spots = [spot for spots in groups for spot in spots]
        for number, spot in enumerate(spots):
            for middle in (spot.x, spot.y):
                assert spot.radius <= middle <= SIZE - spot.radius
            for other in spots[:number]:
                apart = math.dist((spot.x, spot.y), (other.x, other.y))
                assert apart > spot.radius + other.radius + GAP


@pytest.mark.parametrize("place", world.PLACES)
def test_a_place_holds_its_group(place):
    left, top, right, bottom = (part * SIZE for part in world.PLACES[place])
    chance = random.Random(4)
    for _ in range(20):
        ((spot,),) = picture.arrange(scene(place=place), chance)
        assert left < spot.x < right
        assert top < spot.y < bottom


@pytest.mark.parametrize("texture", ["striped", "checked"])
def test_a_background_texture_is_half_in_the_darker_tone(texture):
    pixels = picture.paint("blue", texture, [])
    assert share(pixels, "blue") == pytest.approx(0.5, abs=0.01)
    assert share(pixels, "blue", tone=1) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("texture", ["striped", "spotted"])
def test_a_textured_shape_has_both_tones_and_a_plain_one_has_one(texture):
    spot = picture.Spot(64.0, 64.0, 25.0)
    plain, marked = (
        picture.paint("white", "plain", [(scene(texture=kind).groups[0], spot)])
        for kind in ("plain", texture)
    )
    assert share(plain, "red", tone=1) == 0
    assert share(marked, "red", tone=1) > 0.15 * share(plain, "red")
    assert share(marked, "red") > 0.15 * share(plain, "red")

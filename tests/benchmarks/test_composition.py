"""benchmarks/composition.py: what its judging calls right, on rendered scenes."""

from dataclasses import replace

import numpy as np
import pytest


@pytest.fixture
def composition(script):
    return script("composition")


@pytest.fixture
def case(composition):
    return composition.cases(1, ("medium",))[0]


def test_a_second_shape_is_right_only_if_the_first_half_is_bit_equal(composition, case):
    first = case.render(case.scene(case.group(), place="left"))
    both = case.scene(case.group(), case.group(other=True), relation="left of")
    image = first.copy()
    image[:, 64:] = case.render(case.scene(case.group(other=True), place="right"))[:, 64:]
    found = composition._inpainted(case, case.caption(both), image)
    assert all(found.values())
    image[0, 0] ^= 1
    assert not composition._inpainted(case, case.caption(both), image)["other half bit-equal"]
    assert not any(list(composition._inpainted(case, case.caption(both), first).values())[:4])


def test_frames_change_their_colour_once_or_through_another(composition, case):
    def frames(*colours):
        scenes = [case.scene(replace(case.group(), colour=each)) for each in colours]
        return [case.render(scene) for scene in scenes]

    one, two = case.colour, case.other_colour
    other = next(each for each in composition.COLOURS if each not in (one, two, case.background))
    prompts = [
        case.caption(case.scene(replace(case.group(), colour=each), place="center"))
        for each in (one, two)
    ]
    once = composition._interpolated(case, prompts, frames(one, one, two))
    through = composition._interpolated(case, prompts, frames(one, other, two))
    back = composition._interpolated(case, prompts, frames(one, two, one, two))
    names = "both ends right", "colour changes once", "once or through one other"
    assert [once[name] for name in names] == [True, True, True]
    assert [through[name] for name in names] == [True, False, True]
    assert [back[name] for name in names] == [True, False, False]


def test_a_shape_is_in_the_same_place_only_if_it_is_near(composition, case):
    image = case.render(case.scene(case.group(), place="center"))
    assert composition._near(image, image)
    assert not composition._near(image, np.roll(image, 20, axis=1))

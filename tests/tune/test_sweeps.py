"""What is chosen of what was measured, and what is measured at all."""

import pytest

from sdbatch.errors import ModelError
from sdbatch.tune.bench import OutOfMemory, Variant
from sdbatch.tune.sweeps import Sweep

BASE = Variant("cpu", "float32", 8, channels_last=True)


def sweep_of(by_count, counts, has_time=True):
    """Return a sweep whose milliseconds by lanes, or by images of a decoder call, are given."""

    def measure(count):
        counts.append(count)
        ms = by_count[count]
        if ms == "full":
            raise OutOfMemory
        return ms

    return Sweep(
        lambda variant: measure(variant.lanes),
        lambda variant, group: measure(group),
        lambda variant, measurements: has_time,
    )


@pytest.mark.parametrize(
    ("by_lanes", "counts", "chosen"),
    [
        ({2: 9, 4: 8, 8: 5, 16: 4, 32: 3, 64: 3}, [8, 16, 32, 64, 4, 2], 32),
        ({2: 9, 4: 8, 8: 5, 16: 5, 32: 5.1}, [8, 16, 32, 4, 2], 8),
        ({2: 3, 4: 3, 8: 5, 16: 6, 32: 7}, [8, 16, 32, 4, 2], 2),
        ({2: 3, 4: 3.01, 8: 3.02, 16: 2.95, 32: 2.95, 64: 3}, [8, 16, 32, 64, 4, 2], 2),
        ({2: 9, 4: 8, 8: 5, 16: "full"}, [8, 16, 4, 2], 8),
        ({2: 9, 4: 8, 8: "full"}, [8, 4, 2], 4),
        ({2: 9, 4: 8, 8: 5, 16: None}, [8, 16, 4, 2], 8),
    ],
)
def test_the_fewest_lanes_that_are_as_fast_as_any_are_chosen(by_lanes, counts, chosen):
    found = []
    assert sweep_of(by_lanes, found).lanes(BASE, 64).lanes == chosen
    assert found == counts


def test_a_device_that_holds_no_lanes_is_an_error():
    sweep = sweep_of({2: "full", 4: "full", 8: "full"}, [])
    with pytest.raises(ModelError, match=r"^engine.lanes = 8 and fewer: none could be drawn here"):
        sweep.lanes(BASE, 64)


@pytest.mark.parametrize(
    ("times", "chosen"), [((5, 3), 4), ((5, 4.9), 8), ((5, None), 8), ((None, None), 8)]
)
def test_what_is_usual_stays_unless_another_is_faster(times, chosen):
    variants = [BASE, Variant("cpu", "float32", 4, channels_last=True)]
    by_lanes = {each.lanes: ms for each, ms in zip(variants, times, strict=True)}
    assert sweep_of(by_lanes, []).fastest(variants).lanes == chosen


def test_without_time_the_first_alone_is_measured():
    counts = []
    sweep = sweep_of({1: 1, 4: 9, 8: 5, 16: 4}, counts, has_time=False)
    assert sweep.lanes(BASE, 64) == BASE
    assert sweep.group(BASE) == 4
    assert counts == [8, 4]


def test_a_decoder_call_has_at_most_half_as_many_images_as_lanes():
    counts = []
    assert sweep_of({1: 9, 2: 8, 4: 5}, counts).group(BASE) == 4
    assert counts == [4, 2, 1]


def test_rewrites_are_chosen_one_by_one_if_an_image_is_faster():
    """Of 50 lanes and a decoding: 600 ms without any."""
    lane = {(): 10, ("a",): 9, ("a", "b"): 8.9, ("a", "c"): 9, ("a", "d"): None}
    decoded = {(): 100, ("a",): 100, ("a", "b"): 100, ("a", "c"): 50, ("a", "d"): 1}
    sweep = Sweep(
        lambda variant: lane[variant.rewrites],
        lambda variant, group: decoded[variant.rewrites],
        lambda variant, measurements: True,
    )
    assert sweep.rewrites(BASE, 4, ["a", "b", "c"]).rewrites == ("a", "c")
    assert sweep.rewrites(BASE, 4, ["a", "d"]).rewrites == ("a",)


def test_rewrites_that_need_too_much_memory_or_time_are_left_out():
    def measure(variant):
        if variant.rewrites:
            raise OutOfMemory
        return 1

    sweep = Sweep(measure, lambda variant, group: 1, lambda *_: True)
    assert sweep.rewrites(BASE, 4, ["a"]).rewrites == ()
    assert sweep_of({8: 1, 4: 1}, [], has_time=False).rewrites(BASE, 4, ["a"]).rewrites == ()

"""The sizing page says what its script prints, and the script what its formulas say."""

from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def sizing(monkeypatch):
    """Import the script as it is run."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import sizing

    return sizing


def test_the_page_has_the_tables_that_the_script_writes(sizing):
    assert sizing.PAGE.read_text() == sizing.page()


def test_an_image_of_50_guided_steps_is_83_tflop(sizing):
    wanted = sizing.Wanted(images=1, gpu="H200", gpus=1, steps=50)
    assert sizing.size(wanted).tflop == pytest.approx(82.9, abs=0.1)


def test_hours_and_money_follow_from_the_rate(sizing):
    wanted = sizing.Wanted(images=72_000, gpu="T4", gpus=2, rate=10.0, price=3.0, start=0.0)
    found = sizing.size(wanted)
    assert (found.hours, found.money) == (1.0, 6.0)
    assert (found.shards, found.shard_seconds) == (72, 100.0)


def test_machines_that_are_lost_cost_a_shard_and_a_start_each(sizing):
    wanted = sizing.Wanted(
        images=72_000, gpu="T4", gpus=2, rate=10.0, spot_loss=0.5, start=260.0
    )  # fmt: skip
    assert sizing.size(wanted).lost == pytest.approx(0.5 / 3600 * 360)


def test_guidance_and_pixels_cost_what_they_add(sizing):
    def tflop(**more):
        return sizing.size(sizing.Wanted(images=1, gpu="L4", gpus=1, **more)).tflop

    assert tflop() - tflop(guided=False) == pytest.approx(25 * sizing.UNET_TFLOP)
    assert tflop(pixels=512 * 768) == pytest.approx(1.5 * tflop())

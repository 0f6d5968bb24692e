"""The FLOP of an image, and the pages that state them."""

import pytest

from tests.benchmarks.conftest import BENCHMARKS

SPEED = (BENCHMARKS.parent / "docs" / "speed.md").read_text(encoding="utf-8")


def test_the_page_on_speed_has_the_tables_that_the_script_prints(script):
    roofline = script("roofline")
    for table in (roofline.costs(), roofline.rates(), roofline.published()):
        assert table in SPEED


def test_sizing_counts_the_flop_of_the_models_true_configuration(script):
    sizing = script("sizing")
    counted = script("models").flop("sd15")
    assert counted == pytest.approx((sizing.UNET_TFLOP, sizing.VAE_TFLOP), rel=1e-3)


def test_sizing_assumes_the_share_of_the_peak_that_is_predicted(script):
    roofline, sizing = script("roofline"), script("sizing")
    drawing = roofline.Drawing("as sizing's examples", sizing.Wanted(1, "H100", 1).steps)
    rate, share = roofline.predicted(drawing, roofline.EAGER)
    assert round(share, 2) == sizing.EAGER_SHARE
    assert sizing.size(sizing.Wanted(1, "H100", 1)).rate == pytest.approx(rate, rel=0.02)


def test_no_prediction_is_above_the_roof(script):
    roofline = script("roofline")
    for drawing in roofline.DRAWINGS:
        roof = roofline.CEILING / roofline.tflop(drawing)
        eager, _ = roofline.predicted(drawing, roofline.EAGER)
        compiled, _ = roofline.predicted(drawing, roofline.COMPILED)
        assert eager < compiled < roof

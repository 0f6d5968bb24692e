"""Hires fix: a finished first pass joins the lanes of its second size."""

import numpy as np
import pytest
import torch
from PIL import Image

from sdbatch.engine.enlarge import enlarge_latents, with_enlarged
from sdbatch.engine.request import Follow, Request
from tests.sd1 import build_request

UPSCALERS = ("latent", "latent_bicubic_antialiased", "latent_nearest_exact", "lanczos", "nearest")


def hires(kind, **keys):
    return build_request(**{**kind.defaults, "hires_scale": 2, "num_inference_steps": 4, **keys})


@pytest.mark.parametrize("upscaler", UPSCALERS)
def test_an_enlarged_image_has_the_second_size_and_the_same_bits_among_others(
    kind, engine, upscaler
):
    request = hires(kind, hires_upscaler=upscaler)
    alone = engine.submit(request).result()
    assert alone.image.shape == (request.height * 2, request.width * 2, 3)
    others = [build_request(**kind.defaults, seed=seed) for seed in range(5)]
    mixed = [hires(kind, hires_upscaler=each, seed=9) for each in UPSCALERS]
    futures = [engine.submit(each) for each in (*others, *mixed, request)]
    assert np.array_equal(futures[-1].result().image, alone.image)
    assert all(future.result().exact for future in futures)


def test_the_second_pass_draws_all_of_its_steps(kind, engine):
    steps = []
    follow = Follow(step=lambda *each: steps.append(each), preview=lambda drawn: None)
    request = hires(kind, sampler="euler", hires_steps=3, hires_strength=0.5)
    engine.submit(request, follow=follow).result()
    assert steps == [(tick, 7) for tick in range(1, 8)]


def test_previews_of_both_passes_count_all_ticks(kind, engine):
    shapes = []
    follow = Follow(
        step=lambda *each: None, preview=lambda d: shapes.append(d.image.shape[0]), previews=3
    )
    request = hires(kind, sampler="euler", hires_steps=4)
    engine.submit(request, follow=follow).result()
    assert shapes == sorted(shapes)
    assert {request.height, request.height * 2} <= set(shapes)


def test_another_strength_draws_another_image_from_the_same_first_pass(kind, engine):
    images = [engine.submit(hires(kind, hires_strength=each)).result().image for each in (0.3, 0.9)]
    assert not np.array_equal(*images)


def test_the_second_size_is_a_multiple_of_8():
    request = Request(prompt="a dog", height=64, width=72, hires_scale=1.3)
    enlarged = request.enlarged()
    assert (enlarged.height, enlarged.width) == (80, 88)
    assert enlarged.enlarged() is None


@pytest.mark.parametrize(("steps", "strength"), [(20, 0.7), (7, 0.35), (1, 1.0), (9, 0.01)])
def test_the_second_passes_schedule_leaves_exactly_its_steps(steps, strength):
    request = Request(prompt="a dog", hires_scale=2, hires_steps=steps, hires_strength=strength)
    count, first = request.enlarged().steps_from_picture()
    assert count - first == steps
    assert count == int(steps / min(strength, 0.999))


def test_latents_are_enlarged_as_torch_does_by_automatic1111s_names():
    first = Request(prompt="a dog", height=64, width=64, hires_scale=1.5)
    latents = torch.randn(4, 8, 8)
    for upscaler, options in {
        "latent": {"mode": "bilinear"},
        "latent_bicubic_antialiased": {"mode": "bicubic", "antialias": True},
        "latent_nearest": {"mode": "nearest"},
    }.items():
        second = first.model_copy(update={"hires_upscaler": upscaler}).enlarged()
        expected = torch.nn.functional.interpolate(latents[None], size=(12, 12), **options)[0]
        assert torch.equal(enlarge_latents(latents, first, second), expected)


def test_pictures_are_enlarged_as_pillow_does():
    first = Request(prompt="a dog", height=64, width=72, hires_scale=2, hires_upscaler="lanczos")
    picture = np.random.default_rng(0).integers(0, 256, (64, 72, 3), np.uint8)
    enlarged = with_enlarged(first.enlarged(), picture).inputs["image"]
    expected = Image.fromarray(picture).resize((144, 128), Image.Resampling.LANCZOS)
    assert np.array_equal(enlarged, np.asarray(expected))


def test_a_second_pass_with_too_many_steps_fails_its_row(kind, engine):
    request = hires(kind, hires_steps=500, hires_strength=0.2)
    with pytest.raises(ValueError, match="hires_steps = 500: must be at most 199 with"):
        engine.submit(request).result()

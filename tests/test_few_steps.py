"""Models and LoRAs of few steps: their names, and the values that they need."""

import pytest

from sdbatch.few_steps import find_recipe, needs_distilled
from sdbatch.samplers import NAMES

FITTING = {"sampler": "lcm", "num_inference_steps": 4, "guidance_scale": 1.0}


@pytest.mark.parametrize(
    ("name", "title", "samplers", "steps", "guidance"),
    [
        ("latent-consistency/lcm-lora-sdv1-5", "an LCM", ("lcm",), (1, 8), (1, 2)),
        ("LCM_Dreamshaper_v7", "an LCM", ("lcm",), (1, 8), (1, 2)),
        ("h1t/TCD-SD15-LoRA", "a TCD", ("tcd",), (2, 50), (1, 1)),
        (
            "ByteDance/Hyper-SD/Hyper-SD15-4steps-lora.safetensors",
            "a Hyper-SD",
            ("ddim_trailing", "tcd"),
            (4, 4),
            (1, 1),
        ),
        (
            "Hyper-SD15-1step-lora.safetensors",
            "a Hyper-SD for 1 to 8 steps",
            ("tcd",),
            (1, 8),
            (1, 1),
        ),
        (
            "Hyper-SD15-12steps-CFG-lora.safetensors",
            "a Hyper-SD for guidance",
            ("ddim_trailing", "tcd"),
            (12, 12),
            (5, 8),
        ),
        (
            "pcm_sd15_smallcfg_2step_converted.safetensors",
            "a PCM",
            ("ddim_trailing", "euler"),
            (2, 2),
            (1, 2),
        ),
        (
            "pcm_sd15_normalcfg_16step_converted.safetensors",
            "a PCM for guidance",
            ("ddim_trailing", "euler"),
            (16, 16),
            (2, 9),
        ),
    ],
)
def test_a_name_says_how_a_distilled_model_is_drawn(name, title, samplers, steps, guidance):
    recipe = find_recipe(name)
    assert (recipe.title, recipe.samplers, recipe.steps, recipe.guidance) == (
        title,
        samplers,
        steps,
        guidance,
    )
    assert set(recipe.samplers) <= set(NAMES)


@pytest.mark.parametrize(
    "name", ["film grain", "calcmodel", "hyperrealism_v3", "tcdx", "style-4step"]
)
def test_other_names_say_nothing(name):
    assert find_recipe(name) is None


def test_conflicts_name_the_key_and_what_it_must_be():
    lcm = find_recipe("lcm")
    assert list(lcm.conflicts(FITTING)) == []
    wrong = {"sampler": "dpmpp_2m", "num_inference_steps": 25, "guidance_scale": 7.5}
    assert list(lcm.conflicts(wrong)) == [
        ("sampler", "lcm"),
        ("num_inference_steps", "1 to 8"),
        ("guidance_scale", "1 to 2"),
    ]
    assert list(find_recipe("Hyper-SD15-2steps").conflicts(FITTING)) == [
        ("sampler", "ddim_trailing or tcd"),
        ("num_inference_steps", "2"),
    ]


def test_lcm_and_tcd_alone_are_samplers_for_distilled_models():
    assert [name for name in NAMES if needs_distilled(name)] == ["lcm", "tcd"]

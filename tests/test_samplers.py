"""The names of samplers, of those with a schedule, and of other tools."""

import diffusers
import pytest

from sdbatch.job import parse
from sdbatch.samplers import NAMES, NUMBERS, SAMPLERS, find, split, title


def test_names_are_samplers_with_the_schedules_that_they_have():
    assert len(set(NAMES)) == len(NAMES)
    assert set(SAMPLERS) < set(NAMES)
    assert "dpmpp_2m_karras" in NAMES
    assert "ddim_karras" not in NAMES
    assert split("dpm2_a") == (SAMPLERS["dpm2_a"], None)
    assert split("dpm2_a_karras") == (SAMPLERS["dpm2_a"], "karras")
    assert title("dpmpp_2m_sde_exponential") == "DPM++ 2M SDE Exponential"


@pytest.mark.parametrize("name", NAMES)
def test_every_name_and_its_title_is_found(name):
    assert find(name) == find(title(name)) == find(title(name).upper()) == name


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_scheduler_of_diffusers_is_found_by_its_class(name):
    kind = SAMPLERS[name].scheduler
    assert hasattr(diffusers, kind)
    assert SAMPLERS[find(kind)].scheduler == kind


@pytest.mark.parametrize(
    ("other", "ours"),
    [
        ("k_euler_ancestral", "euler_a"),
        ("K_EULER_ANCESTRAL", "euler_a"),
        ("Euler a", "euler_a"),
        ("Euler A", "euler_a"),
        ("EulerAncestralDiscreteScheduler", "euler_a"),
        ("DPM++ 2M Karras", "dpmpp_2m_karras"),
        ("dpm++ 2m karras", "dpmpp_2m_karras"),
        ("sample_dpmpp_2m", "dpmpp_2m"),
        ("DPMSolverMultistepScheduler", "dpmpp_2m"),  # its default is dpmsolver++ of order 2
        ("DPM2 a Karras", "dpm2_a_karras"),
        ("dpm_2_ancestral", "dpm2_a"),
        ("k_dpm_2", "dpm2"),
        ("PLMS", "pndm"),
        ("k_lms", "lms"),
        ("uni_pc", "unipc"),
        ("DDIM", "ddim"),
        (4, "euler_a"),
        (4.0, "euler_a"),
        ("4", "euler_a"),
        ("DPM++ 2S a", None),  # ancestral, and ours is not
        ("DDPM", None),
        ("Euler a Karras", None),
        (9, None),  # DiffusionDB: another one
        (0, None),
        (True, None),
        (None, None),
        ("", None),
    ],
)
def test_a_sampler_is_found_by_the_name_that_another_tool_gives_it(other, ours):
    assert find(other) == ours


def test_diffusiondbs_numbers_are_those_of_its_paper():
    # ddim: 1, plms: 2, k_euler: 3, k_euler_ancestral: 4, k_heun: 5, k_dpm_2: 6,
    # k_dpm_2_ancestral: 7, k_lms: 8, others: 9
    paper = ["ddim", "plms", "k_euler", "k_euler_ancestral"]
    paper += ["k_heun", "k_dpm_2", "k_dpm_2_ancestral", "k_lms"]
    assert [NUMBERS[number] for number in range(1, 9)] == [find(name) for name in paper]


@pytest.mark.parametrize("other", ["DPM++ 2M Karras", "k_dpmpp_2m karras"])
def test_a_job_may_name_a_sampler_as_another_tool_does(other):
    values = {"prompts": {"rows": [{"prompt": "a"}]}, "model": "m", "output": {"path": "o"}}
    assert parse({**values, "sampling": {"sampler": other}}).sampling.sampler == "dpmpp_2m_karras"

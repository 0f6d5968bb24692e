"""The names of samplers, and of those with a schedule."""

from sdbatch.samplers import NAMES, SAMPLERS, split, title


def test_names_are_samplers_with_the_schedules_that_they_have():
    assert len(set(NAMES)) == len(NAMES)
    assert set(SAMPLERS) < set(NAMES)
    assert "dpmpp_2m_karras" in NAMES
    assert "ddim_karras" not in NAMES
    assert split("dpm2_a") == (SAMPLERS["dpm2_a"], None)
    assert split("dpm2_a_karras") == (SAMPLERS["dpm2_a"], "karras")
    assert title("dpmpp_2m_sde_exponential") == "DPM++ 2M SDE Exponential"

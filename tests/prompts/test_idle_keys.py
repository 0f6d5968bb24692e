"""Keys that change nothing, of which the plan and the start of a run say so."""

import pytest

from sdbatch.prompts.check import describe_table
from sdbatch.prompts.table import open_table


@pytest.mark.parametrize(
    ("job", "columns", "notes"),
    [
        ({"sampling": {"mix": 0.5}}, "", ["mix changes nothing without prompt_b or seed_b"]),
        ({}, "mix,seed_b", []),
        ({"prompts": {"frames": 3}}, "prompt_b", []),
        (
            {"prompts": {"frames": 3}},
            "",
            ["prompts.frames changes nothing without prompt_b or seed_b"],
        ),
        (
            {"sampling": {"hires_steps": 5}},
            "hires_strength,variation_seed",
            [
                "variation_seed changes nothing without variation_strength",
                "hires_steps, hires_strength change nothing without hires_scale",
            ],
        ),
        (
            {"sampling": {"strength": 0.5, "only_masked": True}},
            "",
            [
                "strength changes nothing without image",
                "only_masked changes nothing without mask_image or mask_from_alpha",
            ],
        ),
        (
            {
                "sampling": {"strength": 0.5, "hires_steps": 5},
                "stages": [{"draw": {"hires_scale": 1.5}}],
            },
            "",
            [],
        ),
    ],
)
def test_keys_that_change_nothing_are_named_with_what_they_need(
    make_job, write, job, columns, notes
):
    names = ["prompt", *filter(None, columns.split(","))]
    path = write("t.csv", f"{','.join(names)}\n{','.join('a' for _ in names)}\n")
    made = make_job(**{**job, "prompts": {"path": path, **job.get("prompts", {})}})
    assert [*describe_table(made, open_table(made.prompts))] == notes

"""Sampling keys that are set and change nothing, because no key that they need is set."""

from collections.abc import Iterator

from sdbatch.job import Job
from sdbatch.prompts.columns import explicit_keys

# Keys, and those of which one must be set too; `image` and `mask_image` are columns.
_NEEDED = (
    (("mix", "prompts.frames"), ("prompt_b", "seed_b")),
    (("prompt_b", "seed_b"), ("mix", "prompts.frames")),
    (("variation_seed",), ("variation_strength",)),
    (("hires_upscaler", "hires_steps", "hires_strength"), ("hires_scale",)),
    (("strength", "image_guidance_scale"), ("image",)),
    (("mask_blur", "mask_fill", "only_masked"), ("mask_image", "mask_from_alpha")),
    (("only_masked_padding",), ("only_masked",)),
)


def describe_idle_keys(job: Job, columns: dict[str, str]) -> Iterator[str]:
    """Yield which keys of the job or of the table change nothing, and what they need.

    Args:
        job: with its stages, which may draw from the pictures that are drawn.
        columns: our name -> the table's name, of the columns that are used.
    """
    given = {*explicit_keys(job.sampling), *columns}
    for again in job.draw_again:
        given |= {*again, "image"}
    if job.prompts.frames is not None:
        given.add("prompts.frames")
    for keys, needed in _NEEDED:
        idle = [key for key in keys if key in given]
        if idle and given.isdisjoint(needed):
            verb = "changes" if len(idle) == 1 else "change"
            yield f"{', '.join(idle)} {verb} nothing without {' or '.join(needed)}"

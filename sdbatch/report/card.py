"""The dataset card: README.md of the output, with the front matter that Hugging Face reads."""

from huggingface_hub import DatasetCardData

from sdbatch.job import Job
from sdbatch.output import formats, identity, names
from sdbatch.output.devices import several_devices
from sdbatch.report.closing import Report

MAX_REASONS = 20
MAX_CHARACTERS = 500  # of a reason or the title
# The Hub's size categories: https://github.com/huggingface/hub-docs/blob/main/datasetcard.md
_HUB_SIZES = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")


def dataset_card(job: Job, report: Report) -> str:
    """Return README.md of a finished output: its content, how it was made and how to load it."""
    files = f"{names.DATA}/*.{formats.suffix(job.output)}"
    front_matter = DatasetCardData(
        pretty_name=_cut(job.title),
        annotations_creators=["machine-generated"],
        task_categories=["text-to-image", *["image-to-image"] * bool(report.from_pictures)],
        tags=["synthetic", "sdbatch"],
        size_categories=[size_category(report.images)],
        configs=[{"config_name": "default", "data_files": files}],
        **formats.card_features(job.output),
    )
    return _TEMPLATE.format(
        front_matter=front_matter.to_yaml(),
        title=_cut(job.title),
        images=f"{report.images:,}",
        pictures=_from_pictures(report),
        failed=f"{report.failed:,}",
        reasons=_reason_list(report),
        model=job.model.name,
        revision=job.model.revision or job.model.sha256,
        sampler=job.sampling.sampler,
        steps=job.sampling.num_inference_steps,
        guidance=f"{job.sampling.guidance_scale:g}",
        width=job.sampling.width,
        height=job.sampling.height,
        fingerprint=identity.fingerprint(job, identity.versions()),
        devices=f" {several_devices(report.devices) or ''}".rstrip(),
        output=report.output,
    )


def size_category(images: int) -> str:
    """Return the Hub's name for the order of magnitude of a dataset."""
    index = len(str(images)) - 4  # 1,000 has 4 digits
    if index < 0:
        return f"n<{_HUB_SIZES[0]}"
    if index + 1 >= len(_HUB_SIZES):
        return f"n>{_HUB_SIZES[-1]}"
    return f"{_HUB_SIZES[index]}<n<{_HUB_SIZES[index + 1]}"


def _cut(text: str) -> str:
    """Return a text for the page; " ..." marks a cut."""
    return f"{text[:MAX_CHARACTERS]} ..." if len(text) > MAX_CHARACTERS else text


def _from_pictures(report: Report) -> str:
    if not report.from_pictures:
        return "; none is a photograph"
    return (
        f", {report.from_pictures:,} of them also from pictures, which may be photographs "
        f"(`image_sha256`)"
    )


def _reason_list(report: Report) -> str:
    """Return the most frequent reasons as a Markdown list; empty if no row failed."""
    reasons = list(report.reasons.items())[:MAX_REASONS]
    if not reasons:
        return ""
    lines = "".join(f"- {count:,}: {_cut(reason)}\n" for reason, count in reasons)
    return f"\nThe failed rows are in `failed/`. Number of rows by reason:\n\n{lines}"


_TEMPLATE = """---
{front_matter}
---

# {title}

{images} images drawn from text by a trained model{pictures}. {failed} rows failed.
{reasons}
- model: {model} ({revision})
- settings of a row that sets none: {sampler}, {steps} steps, guidance {guidance}, {width}x{height}
- fingerprint: {fingerprint}

Each row holds the values that its image was drawn with. Each image file holds them too, and states
that the image was made by a trained model. `job.yaml` is the job that drew the dataset; with the
library versions that it lists, the job draws the same bytes again.{devices}

```python
from datasets import load_dataset

images = load_dataset("{output}", split="train")
```
"""

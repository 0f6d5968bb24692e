"""The dataset card: README.md of the output, with the front matter that Hugging Face reads."""

import yaml

from sdbatch import plan
from sdbatch.job import Job
from sdbatch.report.summary import Report
from sdbatch.storage import Store

CARD_FILE = "README.md"
_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"))
_LARGER = ((10**7, "1M<n<10M"), (10**8, "10M<n<100M"), (10**9, "100M<n<1B"))


def write(store: Store, job: Job, report: Report) -> None:
    """Write README.md: what the dataset is, how it was made, how to load it."""
    store.put(CARD_FILE, card(job, report).encode())


def card(job: Job, report: Report) -> str:
    """Return the dataset card of a finished output."""
    size = next((name for most, name in (*_SIZES, *_LARGER) if report.images < most), "n>1T")
    suffix = "parquet" if job.output.format == "parquet" else "tar"
    front = {
        "pretty_name": job.title,
        "annotations_creators": ["machine-generated"],
        "task_categories": ["text-to-image"],
        "tags": ["synthetic", "sdbatch"],
        "size_categories": [size],
        "configs": [{"config_name": "default", "data_files": f"data/*.{suffix}"}],
    }
    failed = "".join(f"- {count:,}: {reason}\n" for reason, count in report.reasons.items())
    return _CARD.format(
        front=yaml.safe_dump(front, sort_keys=False, allow_unicode=True),
        title=job.title,
        images=f"{report.images:,}",
        failed=f"{report.failed:,}",
        reasons=f"\nRows that could not be drawn, in `failed/`, by reason:\n\n{failed}"
        if failed
        else "",
        model=job.model.name,
        revision=job.model.revision or job.model.sha256 or "as built in",
        sampler=job.sampling.sampler,
        steps=job.sampling.num_inference_steps,
        guidance=f"{job.sampling.guidance_scale:g}",
        width=job.sampling.width,
        height=job.sampling.height,
        fingerprint=plan.fingerprint(job, plan.versions()),
        builder="parquet" if suffix == "parquet" else "webdataset",
        suffix=suffix,
    )


_CARD = """---
{front}---

# {title}

{images} images drawn from text by a trained model; none is a photograph. {failed} rows failed.
{reasons}
- model: {model} ({revision})
- unless a row says otherwise: {sampler}, {steps} steps, guidance {guidance}, {width}x{height}
- fingerprint: {fingerprint}

Each row holds the values its image was drawn with, and each image file carries them too, with the
disclosure that it was made by a trained model. `job.yaml` is the job that drew it; run again with
the versions it names, it draws the same bytes.

```python
from datasets import load_dataset

images = load_dataset("{builder}", data_files="data/*.{suffix}", split="train")
```
"""

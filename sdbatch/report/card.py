"""The dataset card: README.md of the output, with the front matter that Hugging Face reads."""

from typing import Any

import yaml

from sdbatch.job import Job, Output
from sdbatch.output import plan
from sdbatch.report.closing import Report
from sdbatch.storage import Store

CARD_FILE = "README.md"
_STEPS = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")


def write(store: Store, job: Job, report: Report) -> None:
    """Write README.md: what the dataset is, how it was made, how to load it."""
    store.put(CARD_FILE, card(job, report).encode())


def card(job: Job, report: Report) -> str:
    """Return the dataset card of a finished output."""
    suffix = "parquet" if job.output.format == "parquet" else "tar"
    front = {
        "pretty_name": job.title,
        "annotations_creators": ["machine-generated"],
        "task_categories": ["text-to-image"],
        "tags": ["synthetic", "sdbatch"],
        "size_categories": [size_category(report.images)],
        "configs": [{"config_name": "default", "data_files": f"data/*.{suffix}"}],
        **_features(job.output),
    }
    shown = list(report.reasons.items())[:20]
    failed = "".join(f"- {count:,}: {reason}\n" for reason, count in shown)
    return _CARD.format(
        front=yaml.safe_dump(front, sort_keys=False, allow_unicode=True),
        title=job.title,
        images=f"{report.images:,}",
        failed=f"{report.failed:,}",
        reasons=f"\nRows that could not be drawn, in `failed/`, by reason:\n\n{failed}"
        if failed
        else "",
        model=job.model.name,
        revision=job.model.revision or job.model.sha256,
        sampler=job.sampling.sampler,
        steps=job.sampling.num_inference_steps,
        guidance=f"{job.sampling.guidance_scale:g}",
        width=job.sampling.width,
        height=job.sampling.height,
        fingerprint=plan.fingerprint(job, plan.versions()),
        output=report.output,
    )


def size_category(images: int) -> str:
    """Return the hub's name for a dataset's order of magnitude."""
    at = len(str(images)) - 4  # digits above 999
    if at < 0:
        return f"n<{_STEPS[0]}"
    if at + 1 >= len(_STEPS):
        return f"n>{_STEPS[-1]}"
    return f"{_STEPS[at]}<n<{_STEPS[at + 1]}"


def _features(output: Output) -> dict[str, Any]:
    """Return the types of a WebDataset's members: `datasets` would guess them from five images."""
    names = {"__key__": "string", "__url__": "string", output.image_format: "image"}
    names |= {"json": "json", "txt": "string"}
    features = [{"name": name, "dtype": kind} for name, kind in names.items()]
    return {"dataset_info": {"features": features}} if output.format == "webdataset" else {}


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

images = load_dataset("{output}", split="train")
```
"""

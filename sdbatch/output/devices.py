"""The kinds of device that drew an output, from the facts of its receipts."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from sdbatch.output.receipts import Receipt


def count_devices(receipts: Iterable[Receipt]) -> dict[str, int]:
    """Return the kinds of device, as `describe_device` has them, with the images of each."""
    images: Counter[str] = Counter()
    for receipt in receipts:
        if receipt.images and receipt.facts.get("device"):
            images[describe_device(receipt.facts["device"])] += receipt.images
    return dict(images.most_common())


def describe_device(facts: Mapping[str, Any]) -> str:
    """Return a kind of device in a few words: the same text where the bits are the same."""
    if facts["kind"] == "cuda":
        units = f"{facts['multiprocessors']} multiprocessors"
        details = [units, f"CUDA {facts['cuda']}", f"cuDNN {facts['cudnn']}"]
    else:
        details = [facts["instructions"], *([] if facts["onednn"] else ["without oneDNN"])]
    details += [f"{name}={value}" for name, value in facts["environment"].items()]
    return f"{facts['name']} ({', '.join(details)})"


def several_devices(images: Mapping[str, int]) -> str | None:
    """Return the sentences that say which kinds of device drew an output; None if it was one.

    Args:
        images: of each kind, from `count_devices`.
    """
    if len(images) < 2:
        return None
    shares = ", ".join(f"{count:,} images by {kind}" for kind, count in images.items())
    return (
        f"{len(images)} kinds of device drew this output: {shares}. The bits of a row may differ "
        f"between them."
    )

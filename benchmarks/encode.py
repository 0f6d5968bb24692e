"""What encoding an image costs a core, and how large its file is, by format and PNG level.

    python benchmarks/encode.py [--repeats 7] [--output benchmarks/results/encode.json]

Two pictures of 512x512: "photograph" is 1/f noise, which has a photograph's spectrum; "drawing" is
sixteen images of the embedded model side by side. All variants take turns, on one core; a figure
is the median of its CPU time. Each file is written as a run writes it, with its parameters. Prints
a table and, on the last line, JSON.
"""

import statistics
import time
from pathlib import Path

import click
import models
import numpy as np
import torch
from findings import report
from numpy.typing import NDArray

from sdbatch import schema
from sdbatch.engine.engine import Engine
from sdbatch.engine.request import Request
from sdbatch.models.build import Build
from sdbatch.models.sd1.family import StableDiffusion1
from sdbatch.models.sd1.loading import assemble
from sdbatch.output.image_file import Encoding, encode_image
from sdbatch.registry import IMAGE_FORMATS

SIDE = 512  # pixels
LEVELS = range(10)  # of PNG
PROMPTS = ("a red circle", "two blue squares", "a green triangle above a yellow circle", "a star")


def photograph() -> NDArray[np.uint8]:
    """Return a picture whose amplitudes fall with frequency, as those of photographs do."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(SIDE)[:, None], np.fft.rfftfreq(SIDE)[None, :])
    frequency[0, 0] = np.inf
    layers = []
    for _ in range(3):
        spectrum = np.fft.rfft2(rng.normal(size=(SIDE, SIDE))) / frequency
        layers.append(np.fft.irfft2(spectrum, (SIDE, SIDE)))
    grey = layers[0]
    colours = np.stack([grey + 0.2 * layer for layer in layers], axis=-1)
    return np.clip(128 + 45 * colours / colours.std(), 0, 255).astype(np.uint8)


def drawing() -> NDArray[np.uint8]:
    """Return sixteen images of the embedded model, four in a row."""
    pixels = models.pixels(models.EMBEDDED)
    model = assemble(models.parts(models.EMBEDDED), Build("cpu", "float32"))
    engine = Engine(StableDiffusion1(model), lanes=16, threads=1)
    futures = [
        engine.submit(
            Request(
                prompt=PROMPTS[seed % len(PROMPTS)],
                seed=seed,
                num_inference_steps=15,
                height=pixels,
                width=pixels,
            )
        )
        for seed in range((SIDE // pixels) ** 2)
    ]
    images = [future.result().image for future in futures]
    engine.close()
    across = SIDE // pixels
    rows = [np.hstack(images[at : at + across]) for at in range(0, len(images), across)]
    return np.vstack(rows)


def variants() -> dict[str, Encoding]:
    """Return the encodings to compare: each format's default, and each level of PNG."""
    about = {"model": "a-model", "model_hash": "0" * 64, "software": "sdbatch"}
    found = {
        name: Encoding(name, kind.quality, **about)
        for name, kind in IMAGE_FORMATS.items()
        if kind.compression is None
    }
    return found | {
        f"png, compression {level}": Encoding("png", None, **about, compression=level)
        for level in LEVELS
    }


def measure(picture: NDArray[np.uint8], repeats: int) -> dict[str, dict[str, float]]:
    """Return milliseconds of a core and KiB of the file of each variant."""
    request = Request(prompt=PROMPTS[0], seed=0, height=SIDE, width=SIDE)
    row = {**request.model_dump(), "row_key": "0", "sample_index": 0}
    assert {field.name for field in schema.SAMPLING} <= set(row)
    spent: dict[str, list[float]] = {name: [] for name in variants()}
    sizes = {}
    for _ in range(repeats):
        for name, encoding in variants().items():
            began = time.thread_time()
            file = encode_image(picture, row, encoding)
            spent[name].append(1000 * (time.thread_time() - began))
            sizes[name] = round(len(file) / 1024, 1)
    return {
        name: {"ms": round(statistics.median(times), 2), "KiB": sizes[name]}
        for name, times in spent.items()
    }


@click.command(help=__doc__)
@click.option("--repeats", default=7)
@click.option("--output", type=click.Path(path_type=Path), help="Write the JSON here, too.")
def main(repeats: int, output: Path | None) -> None:
    """Measure the encoders."""
    torch.set_num_threads(1)
    found = {}
    for name, picture in (("photograph", photograph()), ("drawing", drawing())):
        found[name] = measure(picture, repeats)
        for variant, cost in found[name].items():
            print(f"{name:12} {variant:20} {cost['ms']:8.2f} ms {cost['KiB']:8.1f} KiB")
    report(output, pixels=f"{SIDE}x{SIDE}", repeats=repeats, found=found)


if __name__ == "__main__":
    main()

"""Tables whose rows are of all modes: from text, a picture, around a mask, between two seeds...

For the tests of runs that are killed, and for benchmarks/mixed_modes.py.
"""

import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

SAMPLERS = ("ddim", "euler", "euler_a", "dpmpp_2m", "unipc")
SIZES = ((64, 64), (64, 64), (96, 64), (64, 96))  # height and width, in pixels
COLUMNS = pa.schema(
    {
        "mode": pa.string(),
        "prompt": pa.string(),
        "prompt_weights": pa.bool_(),
        "negative_prompt": pa.string(),
        "image": pa.binary(),
        "mask_image": pa.binary(),
        "sampler": pa.string(),
        "num_inference_steps": pa.int64(),
        "guidance_scale": pa.float64(),
        "height": pa.int64(),
        "width": pa.int64(),
        "strength": pa.float64(),
        "mask_blur": pa.int64(),
        "mask_fill": pa.string(),
        "only_masked": pa.bool_(),
        "only_masked_padding": pa.int64(),
        "variation_seed": pa.int64(),
        "variation_strength": pa.float64(),
        "prompt_b": pa.string(),
        "seed_b": pa.int64(),
        "mix": pa.float64(),
        "hires_scale": pa.float64(),
        "hires_upscaler": pa.string(),
        "hires_steps": pa.int64(),
        "hires_strength": pa.float64(),
    }
)


def write_table(path: Path, count: int, steps: tuple[int, ...], presets: int = 0) -> None:
    """Write a table of `count` rows of all modes, always the same one, as Parquet."""
    pq.write_table(pa.Table.from_pylist(make_rows(count, steps, presets), COLUMNS), path)


def make_rows(count: int, steps: tuple[int, ...], presets: int = 0) -> list[dict[str, Any]]:
    """Return rows in all modes in turn; a column that a row leaves out has the job's value.

    Args:
        count: of the rows.
        steps: that a row has one of.
        presets: sets of sampler, steps, guidance, size and strength that the rows share; 0: each
            row has its own.
    """
    chance = random.Random(0)
    shared = [_parameters(chance, steps) for _ in range(presets)]
    rows = []
    for number in range(count):
        own = chance.choice(shared) if shared else _parameters(chance, steps)
        mode = list(MODES)[number % len(MODES)]
        prompt = f"a photograph of a dog, number {number}"
        row = {"mode": mode, "prompt": prompt, "negative_prompt": "blurry", **own}
        rows.append(row | MODES[mode](chance, row))
    return rows


def _parameters(chance: random.Random, steps: tuple[int, ...]) -> dict[str, Any]:
    height, width = chance.choice(SIZES)
    return {
        "sampler": chance.choice(SAMPLERS),
        "num_inference_steps": chance.choice(steps),
        "guidance_scale": chance.choice((1.0, 5.0, 6.0, 7.0, 7.5, 8.0)),
        "height": height,
        "width": width,
        "strength": chance.choice((0.5, 0.6, 0.7, 0.75, 0.8)),
    }


def _text(chance: random.Random, row: dict[str, Any]) -> dict[str, Any]:
    return {}


def _image(chance: random.Random, row: dict[str, Any]) -> dict[str, Any]:
    return {"image": _picture(chance)}


def _mask(chance: random.Random, row: dict[str, Any]) -> dict[str, Any]:
    fill = chance.choice(("original", "fill"))
    return {**_masked(chance), "mask_blur": chance.choice((0, 2)), "mask_fill": fill}


def _only_masked(chance: random.Random, row: dict[str, Any]) -> dict[str, Any]:
    return {**_masked(chance), "only_masked": True, "only_masked_padding": 8}


def _variation(chance: random.Random, row: dict[str, Any]) -> dict[str, Any]:
    share = chance.uniform(0.1, 0.5)
    return {"variation_seed": chance.randrange(100), "variation_strength": share}


def _interpolation(chance: random.Random, row: dict[str, Any]) -> dict[str, Any]:
    prompt = f"a painting of a cat, number {chance.randrange(100)}"
    return {"prompt_b": prompt, "seed_b": chance.randrange(100), "mix": chance.uniform(0.1, 0.9)}


def _hires(chance: random.Random, row: dict[str, Any]) -> dict[str, Any]:
    upscaler = chance.choice(("latent", "latent_bicubic", "lanczos"))
    steps = max(1, row["num_inference_steps"] // 2)
    return {
        "hires_scale": 1.5,
        "hires_upscaler": upscaler,
        "hires_steps": steps,
        "hires_strength": row["strength"],
    }


def _over_time(chance: random.Random, row: dict[str, Any]) -> dict[str, Any]:
    at = chance.choice((0.4, 0.5, 0.6))
    return {"prompt": f"{row['prompt']}, [red:blue:{at}]", "prompt_weights": True}


MODES = {
    "text": _text,
    "image": _image,
    "mask": _mask,
    "only_masked": _only_masked,
    "variation": _variation,
    "interpolation": _interpolation,
    "hires": _hires,
    "over_time": _over_time,
}


def _picture(chance: random.Random) -> bytes:
    """Return a soft picture of some size as a file."""
    few = np.random.default_rng(chance.randrange(10**6)).integers(0, 256, (6, 6, 3), np.uint8)
    size = chance.choice(((64, 64), (128, 96), (200, 150)))
    return _save(Image.fromarray(few).resize(size, Image.Resampling.BICUBIC))


def _masked(chance: random.Random) -> dict[str, bytes]:
    """Return a picture, and a mask with a white rectangle."""
    image = _picture(chance)
    width, height = Image.open(io.BytesIO(image)).size
    mask = np.zeros((height, width), np.uint8)
    top, left = chance.randrange(height // 3), chance.randrange(width // 3)
    mask[top : top + height // 2, left : left + width // 2] = 255
    return {"image": image, "mask_image": _save(Image.fromarray(mask))}


def _save(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()

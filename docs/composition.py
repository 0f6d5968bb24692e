"""Draws the pictures of composition.md, in composition/: the jobs that it explains, as strips.

python docs/composition.py
"""

import json
import sys
import tempfile
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import sdbatch
from sdbatch.output.reader import open_images, open_picture
from sdbatch.storage import Store

HERE = Path(__file__).parent
JOBS = HERE.parent / "jobs"
SIDE, GAP, LINE = 128, 6, 13  # pixels
QUALITY = 85
LABELS = ("strength", "variation_strength", "hires_scale", "hires_upscaler")  # that tell rows apart

Tile = tuple[Image.Image, str]  # a picture and the words under it
Row = dict[str, Any]


def main() -> None:
    """Draw the jobs, and write a strip for each mode."""
    folder = HERE / "composition"
    folder.mkdir(exist_ok=True)
    strips = {
        **composition_strips(draw("composition")),
        "draw-again": again_strip(draw("draw_again", "stages=[]"), draw("draw_again")),
        "interpolation": interpolation_strip(draw("interpolation")),
        "tiling": tiling_strip(draw("tiling")),
    }
    for name, strip in strips.items():
        strip.save(folder / f"{name}.jpg", quality=QUALITY, optimize=True)


def draw(name: str, *overrides: str) -> list[Row]:
    """Draw a job and return the rows of its output, in the order of its table."""
    with tempfile.TemporaryDirectory() as output:
        overrides = (f"output.path={output}/out", "output.image_format=png", *overrides)
        job = sdbatch.load_job(str(JOBS / f"{name}.yaml"), list(overrides))
        report = sdbatch.run(job)
        if report.images != report.planned:
            sys.exit(f"{name}: {report.failed} of {report.planned} images failed")
        return list(open_images(Store(report.output)).rows())


def composition_strips(rows: list[Row]) -> dict[str, Image.Image]:
    """Return a strip for each mode of the table: its pictures, then what was drawn."""
    table = [json.loads(line) for line in (JOBS / "composition.jsonl").read_text().splitlines()]
    drawn = {row["row_key"]: row for row in rows}
    strips = {}
    for mode, group in groupby(table, lambda row: str(row["mode"])):
        wanted = list(group)
        tiles = [
            (Image.open(JOBS / wanted[0][column]).convert("RGB"), f"the column {column}")
            for column in ("image", "mask_image")
            if column in wanted[0]
        ]
        tiles += [(open_picture(drawn[row["id"]]), label(row, wanted)) for row in wanted]
        strips[mode.replace(" ", "-")] = strip(tiles)
    return strips


def label(row: Row, rows: list[Row]) -> str:
    """Return what tells a row from the others of its mode: its prompt, or its settings."""
    if len({each["prompt"] for each in rows}) > 1:
        return str(row["prompt"])
    settings = [f"{name} {row[name]}" for name in LABELS if name in row]
    return ", ".join(settings) or f"seed {row['seed']}, {row.get('height', SIDE)} pixels"


def again_strip(first: list[Row], again: list[Row]) -> Image.Image:
    """Return each image, and next to it the one that was drawn from it."""
    tiles = []
    for before, after in zip(first, again, strict=True):
        tiles += [(open_picture(before), ""), (open_picture(after), "drawn again")]
    return strip(tiles)


def interpolation_strip(rows: list[Row]) -> Image.Image:
    """Return the sequences below each other."""
    tiles = [(open_picture(row).resize((SIDE // 2, SIDE // 2)), f"{row['mix']:g}") for row in rows]
    return strip(tiles, columns=len({row["mix"] for row in rows}), side=SIDE // 2)


def tiling_strip(rows: list[Row]) -> Image.Image:
    """Return each picture once, and next to it twice across and down."""
    tiles = []
    for row in rows:
        picture = open_picture(row)
        twice = Image.fromarray(np.tile(np.asarray(picture), (2, 2, 1)))
        tiles += [(picture, ""), (twice.resize(picture.size), "twice across and down")]
    return strip(tiles)


def strip(tiles: Sequence[Tile], columns: int = 0, side: int = SIDE) -> Image.Image:
    """Return pictures next to each other, with words under them."""
    columns = columns or len(tiles)
    font = ImageFont.load_default(10)
    texts = [wrap(words, side, font) for _, words in tiles]
    height = side + LINE * max(map(len, texts)) + GAP
    whole = Image.new(
        "RGB", (columns * (side + GAP) + GAP, -(-len(tiles) // columns) * height + GAP), "#dddddd"
    )
    pen = ImageDraw.Draw(whole)
    for number, ((picture, _), lines) in enumerate(zip(tiles, texts, strict=True)):
        left, top = GAP + number % columns * (side + GAP), GAP + number // columns * height
        if max(picture.size) > side:
            picture = picture.resize((side, side), Image.Resampling.BOX)
        whole.paste(picture, (left, top))
        for line, text in enumerate(lines):
            pen.text((left, top + side + LINE * line), text, "black", font)
    return whole


def wrap(words: str, width: int, font: Any) -> list[str]:
    """Return the lines of a text that is at most `width` pixels wide."""
    lines: list[str] = []
    for word in words.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


if __name__ == "__main__":
    main()

"""`sdbatch sheet`: chosen images of an output side by side, each with its prompt."""

import bisect
import io
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from sdbatch.errors import SdbatchError
from sdbatch.output.reader import open_images, picture
from sdbatch.report.where import choose, condition
from sdbatch.storage import Store

SHEET_FILE = "gallery/sheet.jpg"
SIDE = 256  # pixels of a picture's longer side on the sheet: enlarged by whole numbers, or reduced
GAP = 12  # pixels
TEXT, LINE = 13, 17  # pixels of a letter, of a line
LINES = 3  # at most, of a label's prompt, of its values, of the title
TITLE_CELLS = 4  # the title makes a sheet as wide as so many images, then takes another line
HIGHEST = 65_500  # pixels: libjpeg's JPEG_MAX_DIMENSION
_FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG"}
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
# What a label says where it differs between the images, and the title where it does not.
_SAID = {
    "sampler": "{}",
    "num_inference_steps": "{} steps",
    "guidance_scale": "guidance {:g}",
    "negative_prompt": "not: {}",
}


def make(
    store: Store, count: int, seed: int | None, where: Sequence[str], columns: int, to: str | None
) -> str:
    """Write a sheet of chosen images to the file `to`, or into the output; return where it is.

    Args:
        store: the output, finished or still being drawn.
        count: at most so many images.
        seed: of a random choice; None: the first ones.
        where: conditions that where.condition reads.
        columns: images in a line.
        to: a path or URL that ends with .jpg or .png.

    Raises:
        SdbatchError: there is no output, no such image, no such kind of file, or no room for
            so many images.
    """
    path = store.where(SHEET_FILE) if to is None else to
    kind = _FORMATS.get(PurePosixPath(path).suffix.lower())
    if kind is None:
        raise SdbatchError(f"--to {path!r}: must end with {', '.join(_FORMATS)}.")
    conditions = [condition(text) for text in where]
    images = open_images(store)
    rows = choose(images, count, seed, conditions)
    if not rows:
        raise SdbatchError(f"--where {' and '.join(where)} = no image: must fit one at least.")
    which = "first" if seed is None else f"random (seed {seed})"
    title = f"{len(rows)} of {len(images):,} images, {which}{''.join(f', {w}' for w in where)}"
    made = f"{images.job.title}: {title}, drawn by {images.job.model.name}, a trained model"
    file = io.BytesIO()
    draw(rows, made, columns).save(file, kind, quality=90)
    place = Store(path)
    place.put("", file.getvalue())
    return place.url


def draw(rows: Sequence[dict[str, Any]], title: str, columns: int) -> Image.Image:
    """Draw a sheet of `rows` with `columns` images a line, under `title`.

    Raises:
        SdbatchError: it would be too high.
    """
    font = ImageFont.load_default(TEXT)
    same = {name for name in _SAID if len({row[name] for row in rows}) == 1}
    said = " ".join(", ".join([title, *_values(rows[0], same)]).split())
    labels = [_label(row, set(_SAID) - same, font) for row in rows]
    cell = SIDE + GAP
    columns = min(columns, len(rows))
    wide = min(int(font.getlength(said)) + 1 + 2 * GAP, TITLE_CELLS * cell + GAP)
    width = max(columns * cell + GAP, wide)
    head = _wrap(said, width - 2 * GAP, font)
    first = 2 * GAP + len(head) * LINE
    images = [_fitted(picture(row)) for row in rows]
    tall = max(image.height for image in images)
    high = tall + max(map(len, labels)) * LINE + 2 * GAP
    height = first + -(-len(rows) // columns) * high
    if height > HIGHEST:
        raise SdbatchError(
            f"--columns {columns} = a sheet {height:,} pixels high: must be {HIGHEST:,} at most. "
            f"Ask for more columns, or for fewer --images."
        )
    sheet = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)
    for line, text in enumerate(head):
        pen.text((GAP, GAP + line * LINE), text, "black", font)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        left, top = GAP + number % columns * cell, first + number // columns * high
        sheet.paste(image, (left, top + tall - image.height))
        for line, text in enumerate(label):
            pen.text((left, top + tall + 4 + line * LINE), text, "black", font)
    return sheet


def _fitted(image: Image.Image) -> Image.Image:
    longer = max(image.size)
    if longer <= SIDE:
        times = SIDE // longer
        return image.resize((image.width * times, image.height * times), Image.Resampling.BOX)
    image.thumbnail((SIDE, SIDE))
    return image


def _label(row: dict[str, Any], differing: set[str], font: Font) -> list[str]:
    """Return the lines under an image: its prompt, what it has for itself, its key."""
    texts = (row["prompt"], ", ".join(_values(row, differing)), f"{row['key']}, seed {row['seed']}")
    return [line for text in texts for line in _wrap(text, SIDE, font)]


def _wrap(text: str, width: int, font: Font) -> list[str]:
    """Break `text` into at most LINES lines of `width` pixels; the last says ... if it is cut."""
    lines: list[str] = []
    rest = " ".join(text.split())[: LINES * width]  # a letter is a pixel wide at least
    while rest and len(lines) < LINES:
        cut = len(lines) == LINES - 1 and font.getlength(rest) > width
        end = " ..." if cut else ""
        at = _letters(rest, width - font.getlength(end), font)
        lines.append(rest[:at] + end)
        rest = rest[at:].lstrip()
    return lines


def _letters(text: str, width: float, font: Font) -> int:
    """Return how many letters of `text` to write in `width` pixels: up to a space, if there is."""
    lengths = range(1, len(text) + 1)
    fit = max(1, bisect.bisect(lengths, width, key=lambda count: font.getlength(text[:count])))
    space = text.rfind(" ", 0, fit + 1)
    return fit if fit == len(text) or space < 1 else space


def _values(row: dict[str, Any], names: set[str]) -> list[str]:
    return [form.format(row[name]) for name, form in _SAID.items() if name in names and row[name]]

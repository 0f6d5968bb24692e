"""`sdbatch sheet`: a contact sheet of chosen images of an output, each with its prompt.

Or of chosen sequences, whose images follow each other in the sheet's animation.
"""

import bisect
import io
import os
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from sdbatch.errors import SdbatchError
from sdbatch.output import names
from sdbatch.output.reader import Images, open_images, open_picture
from sdbatch.report.where import Condition, choose_numbers, choose_rows, parse_condition
from sdbatch.storage import Store, is_local

# All lengths are in pixels.
IMAGE_SIDE = 256  # an image's longer side: enlarged by a whole number, or reduced
GAP = 12  # between images
FONT_SIZE, LINE_HEIGHT = 13, 17
MAX_LINES = 3  # of a label's prompt, of its settings, of the title
TITLE_IMAGES = 4  # the title may make a sheet as wide as this many images; a longer one wraps
MAX_HEIGHT = 65_500  # libjpeg's JPEG_MAX_DIMENSION
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
MAX_WEBP = 16_383  # libwebp's WEBP_MAX_DIMENSION
FRAME_MS = 100  # between two images of a sequence
_FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG"}
# The title shows the settings that are equal for all images, each label those that differ.
_SETTINGS = {
    "sampler": "{}",
    "num_inference_steps": "{} steps",
    "guidance_scale": "guidance {:g}",
    "negative_prompt": "not: {}",
}


def make_sheet(
    store: Store, count: int, seed: int | None, where: Sequence[str], columns: int, to: str | None
) -> str:
    """Write a sheet of chosen images to a file; return the file's path or URL.

    Args:
        store: the output, finished or still being drawn.
        count: the largest number of images.
        seed: of a random choice; None: the first images.
        where: conditions, as `parse_condition` reads them.
        columns: images per line.
        to: the file, a path or URL that ends with .jpg or .png; None: a file in the output.

    Raises:
        SdbatchError: there is no output, no image matches, the file's format is unknown, or the
            sheet would be too high.
    """
    file_format = _FORMATS.get(PurePosixPath(names.SHEET if to is None else to).suffix.lower())
    if file_format is None:
        raise SdbatchError(f"--to = {to!r}: must end with {', '.join(_FORMATS)}.")
    conditions = [parse_condition(text) for text in where]
    images = open_images(store)
    rows = choose_rows(images, count, seed, conditions)
    if not rows:
        raise SdbatchError(
            f"No image matches --where {' and '.join(where)}. Change or remove a condition."
        )
    title = _title(images, f"{len(rows)} of {len(images):,} images", seed, where)
    data = io.BytesIO()
    draw_sheet(rows, title, columns).save(data, file_format, quality=90)
    return _write(store, names.SHEET, to, data.getvalue())


def make_animation(
    store: Store, count: int, seed: int | None, where: Sequence[str], columns: int, to: str | None
) -> str:
    """Write an animated sheet of chosen sequences to a file; return the file's path or URL.

    Args:
        store: the output of a job with `prompts.frames`, finished or still being drawn.
        count: the largest number of sequences.
        seed: of a random choice; None: the first sequences.
        where: conditions on their first images.
        columns: sequences per line.
        to: the file, a path or URL that ends with .webp; None: a file in the output.

    Raises:
        SdbatchError: as `make_sheet`; or the job draws no sequences.
    """
    if PurePosixPath(names.ANIMATION if to is None else to).suffix.lower() != ".webp":
        raise SdbatchError(f"--to = {to!r}: must end with .webp, as --animate is given.")
    images = open_images(store)
    frames = images.job.prompts.frames
    if frames is None:
        raise SdbatchError(
            f"{store.url} = no sequences: --animate is for jobs with prompts.frames. Leave it out."
        )
    conditions = [Condition("mix", "=", "0"), *map(parse_condition, where)]
    sequences = _read_sequences(images, choose_numbers(images, count, seed, conditions), frames)
    if not sequences:
        raise SdbatchError("No sequence matches, or none is drawn yet. Change --where or wait.")
    title = _title(images, f"{len(sequences)} sequences of {frames} images", seed, where)
    # All but the image is that of the first, so that the text does not move.
    sheets = (
        draw_sheet([{**s[0], "image": s[frame]["image"]} for s in sequences], title, columns)
        for frame in range(frames)
    )
    first = next(sheets)
    if max(first.size) > MAX_WEBP:
        raise SdbatchError(
            f"--images = {count}: makes a sheet of {first.width:,} x {first.height:,} pixels, must "
            f"be at most {MAX_WEBP:,} wide and high. Set fewer --images or other --columns."
        )
    data = io.BytesIO()
    first.save(
        data, "WEBP", save_all=True, append_images=sheets, duration=FRAME_MS, loop=0, quality=90
    )
    return _write(store, names.ANIMATION, to, data.getvalue())


def _read_sequences(
    images: Images, firsts: Sequence[int], frames: int
) -> list[list[dict[str, Any]]]:
    """Return the rows of the sequences with these first images.

    An image that was not drawn is replaced by the one before it.
    """
    numbers = {n for first in firsts for n in range(first, min(first + frames, len(images)))}
    rows = dict(zip(sorted(numbers), images.rows_at(numbers), strict=True))
    sequences = []
    for first in firsts:
        sequence = [rows[first]] * frames
        for number in range(first + 1, first + frames):
            row = rows.get(number)
            place = row["sample_index"] - rows[first]["sample_index"] if row else 0
            if row and row["row_key"] == rows[first]["row_key"] and 0 < place < frames:
                sequence[place:] = [row] * (frames - place)
        sequences.append(sequence)
    return sequences


def _title(images: Images, count: str, seed: int | None, where: Sequence[str]) -> str:
    choice = ", ".join(["first" if seed is None else f"random (seed {seed})", *where])
    return (
        f"{images.job.title}: {count}, {choice}, drawn by {images.job.model.name}, a trained model"
    )


def _write(store: Store, name: str, to: str | None, data: bytes) -> str:
    """Write a file of the output, or the one at `to`; return its path or URL."""
    file, name = (store, name) if to is None else (Store(to), "")
    if to is not None and is_local(to):
        Store(os.path.dirname(file.path(""))).begin()
    file.put(name, data)
    return file.where(name)


def draw_sheet(rows: Sequence[dict[str, Any]], title: str, columns: int) -> Image.Image:
    """Draw a sheet of `rows` with `columns` images per line, under `title`.

    Raises:
        SdbatchError: it would be too high.
    """
    font = ImageFont.load_default(FONT_SIZE)
    equal = {name for name in _SETTINGS if len({row[name] for row in rows}) == 1}
    title = _join_words(", ".join([title, *_format_settings(rows[0], equal)]))
    labels = [_label_lines(row, set(_SETTINGS) - equal, font) for row in rows]
    columns = min(columns, len(rows))
    cell = IMAGE_SIDE + GAP
    title_width = min(int(font.getlength(title)) + 1 + 2 * GAP, TITLE_IMAGES * cell + GAP)
    width = max(columns * cell + GAP, title_width)
    title_lines = _wrap_text(title, width - 2 * GAP, font)
    title_height = 2 * GAP + len(title_lines) * LINE_HEIGHT
    images = [_resize_image(open_picture(row)) for row in rows]
    image_height = max(image.height for image in images)
    row_height = image_height + max(map(len, labels)) * LINE_HEIGHT + 2 * GAP
    height = title_height + -(-len(rows) // columns) * row_height
    if height > MAX_HEIGHT:
        raise SdbatchError(
            f"--columns = {columns}: makes a sheet {height:,} pixels high, must be at most "
            f"{MAX_HEIGHT:,}. Use more columns or fewer --images."
        )
    sheet = Image.new("RGB", (width, height), "white")
    _draw_lines(sheet, (GAP, GAP), title_lines, font)
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        left = GAP + index % columns * cell
        bottom = title_height + index // columns * row_height + image_height
        sheet.paste(image, (left, bottom - image.height))
        _draw_lines(sheet, (left, bottom + 4), label, font)
    return sheet


def _draw_lines(
    sheet: Image.Image, position: tuple[int, int], lines: Sequence[str], font: Font
) -> None:
    """Write lines of text below each other; `position` is the left upper corner."""
    pen = ImageDraw.Draw(sheet)
    left, top = position
    for index, line in enumerate(lines):
        pen.text((left, top + index * LINE_HEIGHT), line, "black", font)


def _resize_image(image: Image.Image) -> Image.Image:
    longer_side = max(image.size)
    if longer_side <= IMAGE_SIDE:
        factor = IMAGE_SIDE // longer_side
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.BOX)
    image.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
    return image


def _label_lines(row: dict[str, Any], differing: set[str], font: Font) -> list[str]:
    """Return the lines under an image: its prompt, the settings that differ, its key and seed."""
    settings = ", ".join(_format_settings(row, differing))
    texts = (row["prompt"], settings, f"{row['key']}, seed {row['seed']}")
    return [line for text in texts for line in _wrap_text(text, IMAGE_SIDE, font)]


def _wrap_text(text: str, width: int, font: Font) -> list[str]:
    """Break `text` into at most MAX_LINES lines of `width` pixels; " ..." marks a cut."""
    lines: list[str] = []
    rest = _join_words(text)[: MAX_LINES * width]  # a letter is at least a pixel wide
    while rest and len(lines) < MAX_LINES:
        cut = len(lines) == MAX_LINES - 1 and font.getlength(rest) > width
        end = " ..." if cut else ""
        length = _line_length(rest, width - font.getlength(end), font)
        lines.append(rest[:length] + end)
        rest = rest[length:].lstrip()
    return lines


def _line_length(text: str, width: float, font: Font) -> int:
    """Return how many letters of `text` fit into `width` pixels, up to a space if there is one."""
    lengths = range(1, len(text) + 1)
    fitting = max(1, bisect.bisect(lengths, width, key=lambda count: font.getlength(text[:count])))
    space = text.rfind(" ", 0, fitting + 1)
    return fitting if fitting == len(text) or space < 1 else space


def _join_words(text: str) -> str:
    """Return `text` as one line with single spaces."""
    return " ".join(text.split())


def _format_settings(row: dict[str, Any], settings: set[str]) -> list[str]:
    """Return those of `settings` that a row has, as text."""
    return [
        form.format(row[name]) for name, form in _SETTINGS.items() if name in settings and row[name]
    ]

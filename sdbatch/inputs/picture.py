"""From the bytes of a picture file to a checked picture, turned as its EXIF says.

Whatever a file holds, the result is a picture or a ValueError of one line with the reason. Nothing
is guessed: of several frames none is taken, and a damaged file is not drawn as far as it goes.
"""

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from PIL import ExifTags, Image, UnidentifiedImageError

from sdbatch.inputs import colours, file_kinds
from sdbatch.inputs.quiet import QUIET

LEAST_SIDE, MOST_SIDE = 8, 16384  # pixels
MOST_PIXELS = 8192 * 8192
MOST_CHARACTERS = 2**20  # of all texts that a file carries
USER_COMMENT = "UserComment"  # the name of EXIF's comment, besides those of PNG's texts
# What Pillow's readers raise for a damaged file, as random damage shows.
DAMAGE = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, ArithmeticError,
    RuntimeError, MemoryError, AttributeError, struct.error, zlib.error,
)  # fmt: skip
_TURNS = {  # EXIF 2.32, sec. 4.6.4, Orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Picture:
    """A picture as it is looked at, turned by its EXIF orientation."""

    rgb: Image.Image  # smaller than `size` if it was read so
    alpha: Image.Image | None  # None: opaque, or composed on white
    size: tuple[int, int]  # width and height of the file's picture


def read_picture(
    file: bytes, *, keep_alpha: bool = False, enough: tuple[int, int] | None = None
) -> Picture:
    """Read a picture: RGB, composed on white unless its alpha is kept.

    A JPEG file is decoded to a half, a quarter or an eighth where that is still at least as wide
    and high as `enough`: in less time and memory, and hardly to be seen once it is reduced.

    Raises:
        ValueError: it is no picture, is damaged, animated, too small or too large.
    """
    with QUIET:
        picture = _open(file, "image")
        size = picture.size
        if enough and picture.format in ("JPEG", "MPO"):
            picture.draft(None, _turned(enough, _turn_of(picture)))
        turn = _load(picture, file, "image")
        rgb, alpha = colours.split_alpha(picture, f"image = {file_kinds.name_picture(file)}")
    if not keep_alpha:
        rgb, alpha = colours.on_white(rgb, alpha), None
    if turn is not None:
        rgb, alpha = rgb.transpose(turn), alpha and alpha.transpose(turn)
    return Picture(rgb, alpha, _turned(size, turn))


def read_size(file: bytes) -> tuple[int, int]:
    """Return width and height of a picture as it is looked at, from its header.

    Raises:
        ValueError: as `read_picture`, but for damage after the header.
    """
    with QUIET:
        picture = _open(file, "image")
        return _turned(picture.size, _turn_of(picture))


def read_texts(file: bytes) -> dict[str, str]:
    """Return the texts that a picture file carries by their names: PNG's, and EXIF's comment.

    Raises:
        ValueError: as `read_picture`; or the texts are too long.
    """
    with QUIET:
        picture = _open(file, "image")
        _load(picture, file, "image")  # a PNG may have texts after its pixels
        texts = {
            str(name): str(text) for name, text in picture.info.items() if isinstance(text, str)
        }
        comment = _user_comment(picture)
    if comment:
        texts[USER_COMMENT] = comment
    characters = sum(map(len, texts.values()))
    if characters > MOST_CHARACTERS:
        raise ValueError(
            f"image = a picture with texts of {characters} characters: must have at most "
            f"{MOST_CHARACTERS}. Save it without them"
        )
    return texts


def read_mask(file: bytes) -> Image.Image:
    """Read a mask in grey, L: white is drawn anew.

    Raises:
        ValueError: as `read_picture`; or pixels are transparent.
    """
    with QUIET:
        picture = _open(file, "mask_image")
        turn = _load(picture, file, "mask_image")
        grey, alpha = colours.to_grey(picture, f"mask_image = {file_kinds.name_picture(file)}")
    if alpha is not None:
        raise ValueError(
            "mask_image = a picture with transparent pixels: must be opaque, white where the image "
            "is drawn anew, as tools disagree what transparent means. Flatten it on black or white"
        )
    return grey if turn is None else grey.transpose(turn)


def _open(file: bytes, where: str) -> Image.Image:
    """Open a picture file and check what its header says; no pixel is decoded."""
    kind = file_kinds.name_picture(file)
    if kind is None:
        raise ValueError(f"{where} = {file_kinds.refuse(file)}")
    try:
        with _damage(where, kind):
            picture = Image.open(io.BytesIO(file), formats=file_kinds.FORMATS)
            frames = getattr(picture, "n_frames", 1)
    except Image.DecompressionBombError:
        raise _too_large(where, "hundreds of millions of pixels") from None
    width, height = picture.size
    found = f"{width} x {height} pixels"
    if min(width, height) < LEAST_SIDE or max(width, height) > MOST_SIDE:
        raise ValueError(
            f"{where} = {found}: must have sides from {LEAST_SIDE} to {MOST_SIDE} pixels. Resize it"
        )
    if width * height > MOST_PIXELS:
        raise _too_large(where, found)
    if frames > 1 and picture.format != "MPO":  # a phone's photo with a second picture after it
        many = "pages" if picture.format == "TIFF" else "frames"
        raise ValueError(
            f"{where} = {kind} of {frames} {many}: must be one picture. Save the one to use as a "
            f"file of its own"
        )
    return picture


def _load(picture: Image.Image, file: bytes, where: str) -> Image.Transpose | None:
    """Decode the pixels; return how they are turned to be looked at."""
    with _damage(where, str(file_kinds.name_picture(file))):
        picture.load()
    return _turn_of(picture)


@contextmanager
def _damage(where: str, kind: str) -> Iterator[None]:
    """Turn what Pillow raises for a damaged file into the row's reason."""
    try:
        yield
    except DAMAGE as error:
        what = "truncated" if "truncated" in str(error).lower() else "damaged"
        reason = " ".join(str(error).split())[:80] or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = "no header"
        raise ValueError(
            f"{where} = a {what} {kind.split(maxsplit=1)[1]} ({reason}): must be whole. "
            f"Copy or download it again"
        ) from None


def _too_large(where: str, found: str) -> ValueError:
    return ValueError(
        f"{where} = {found}: must have at most {MOST_PIXELS} (8192 x 8192). Resize it"
    )


def _turn_of(picture: Image.Image) -> Image.Transpose | None:
    """Return how a picture is turned to be looked at; None if its EXIF cannot be read.

    Pillow's reader of TIFF turns the picture itself. That of PNG loads the pixels for the EXIF.
    """
    if picture.format == "TIFF":
        return None
    try:
        return _TURNS.get(picture.getexif().get(ExifTags.Base.Orientation, 1))
    except DAMAGE:
        return None


def _user_comment(picture: Image.Image) -> str:
    """Return EXIF's comment; "" if there is none, or it cannot be read."""
    try:
        comment = picture.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment, b"")
    except DAMAGE:
        return ""
    if isinstance(comment, str):
        return comment
    code, text = comment[:8], comment[8:]  # Exif 2.32, sec. 4.6.5, UserComment
    if code == b"UNICODE\0":
        little = text.startswith(b"\xff\xfe")
        return str(text, "utf-16" if little else "utf-16-be", "replace").strip("\0")
    return str(text, "utf-8", "replace").strip("\0 ")


def _turned(size: tuple[int, int], turn: Image.Transpose | None) -> tuple[int, int]:
    sideways = turn is not None and turn >= Image.Transpose.ROTATE_90
    width, height = size
    return (height, width) if sideways and turn != Image.Transpose.ROTATE_180 else size

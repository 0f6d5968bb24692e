"""What a file is by its first bytes, for the text of an error."""

import re

from PIL import features

_PICTURES = {
    "JPEG": rb"\xff\xd8\xff",
    "PNG": rb"\x89PNG",
    "WebP": rb"RIFF....WEBP",
    "GIF": rb"GIF8",
    "BMP": rb"BM",
    "TIFF": rb"II[*+]\0|MM\0[*+]",
    **({"AVIF": rb"....ftypavi[fs]"} if features.check("avif") else {}),
}
FORMATS = tuple(name.upper() for name in _PICTURES)  # Pillow's names
_NAMES = f"{', '.join(list(_PICTURES)[:-1])} or {list(_PICTURES)[-1]}"

_OTHERS = {
    "an HTML page": rb"(?i)<!doctype html|<html",
    "an SVG drawing": rb"<svg",
    "an XML file": rb"<\?xml|<Error",
    "a JSON text": rb"[{\[]",
    "a pointer of Git LFS": rb"version https://git-lfs",
    "a PDF file": rb"%PDF",
    "a PostScript file": rb"%!PS",
    "a Photoshop file": rb"8BPS",
    "a ZIP archive": rb"PK\x03\x04",
    "a gzip archive": rb"\x1f\x8b",
    "an ICO file": rb"\0\0\x01\0",
    "a JPEG XL file": rb"\xff\x0a|\0\0\0\x0cJXL ",
    "a JPEG 2000 file": rb"\xff\x4f\xff\x51|\0\0\0\x0cjP  ",
    "an AVIF file": rb"....ftypavi[fs]",
    "a HEIC file": rb"....ftyp(?:he|mif|msf)",
    "a video": rb"....ftyp|\x1aE\xdf\xa3|RIFF....AVI ",
}
_WAYS_OUT = {
    "an HTML page": "The address is that of a page, or the download was refused",
    "a pointer of Git LFS": "Run `git lfs pull` in its repository",
}


def name_picture(file: bytes) -> str | None:
    """Return "a JPEG file" or the like; None for a file of another kind."""
    for name, beginning in _PICTURES.items():
        if re.match(beginning, file, re.DOTALL):
            return f"{'an' if name == 'AVIF' else 'a'} {name} file"
    return None


def refuse(file: bytes) -> str:
    """Return why a file of another kind is refused, and what to do about it."""
    kind = _name_other(file)
    way_out = _WAYS_OUT.get(kind, "Convert it" if file else "Copy or download it again")
    return f"{kind}: must be a picture file, {_NAMES}. {way_out}"


def _name_other(file: bytes) -> str:
    if not file:
        return "an empty file"
    start = file[:256].removeprefix(b"\xef\xbb\xbf").lstrip()  # a byte order mark
    for kind, beginning in _OTHERS.items():
        if re.match(beginning, start, re.DOTALL) or re.match(beginning, file, re.DOTALL):
            return kind
    text = start.decode(errors="ignore")  # without a character that the cut has parted
    is_text = all(letter.isprintable() or letter.isspace() for letter in text)
    if is_text and len(text.encode()) > len(start) - 4:
        return f"a text that begins with {' '.join(text[:40].split())!r}"
    return f"a file of an unknown kind that begins with the bytes {file[:8].hex()}"

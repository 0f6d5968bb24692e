"""An image as a file: JPEG, PNG or WebP, with how it was made and that it was made by a model.

Inside each file stand
- the generation parameters as the text that AUTOMATIC1111's users know: PNG text `parameters`,
  in JPEG and WebP the EXIF UserComment;
- the same values as JSON, and IPTC's digital source type "trainedAlgorithmicMedia", in XMP.
No clock time, host or path: the bytes are a function of the image and its row.
"""

import io
import json
import re
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import quoteattr, unescape

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, PngImagePlugin

from sdbatch import samplers, schema

# https://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia
MADE_BY_A_MODEL = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
# Characters of a text inside the file: a JPEG segment holds 64 KiB. The table has all of it.
LONGEST = 2000
_SAID = tuple(field.name for field in (*schema.SAMPLING, *schema.ROW))


@dataclass(frozen=True)
class Encoding:
    """How images are encoded, and the model that drew them, for their metadata."""

    image_format: str  # jpg, png, webp
    quality: int  # of jpg and webp
    model: str
    model_hash: str
    software: str


def encode(image: NDArray[np.uint8], row: dict[str, Any], encoding: Encoding) -> bytes:
    """Return `image`, (H, W, 3) RGB, as a file that carries the values of `row`."""
    said = {name: row[name] for name in _SAID}
    for name in ("prompt", "negative_prompt", "row_key"):
        if len(said[name]) > LONGEST:
            said[name], said[f"{name}_cut_at"] = said[name][:LONGEST], LONGEST
    said |= {
        "model": encoding.model,
        "model_hash": encoding.model_hash,
        "software": encoding.software,
    }
    xmp = _xmp(said)
    text = infotext(said)
    file = io.BytesIO()
    picture = Image.fromarray(image)
    if encoding.image_format == "png":
        chunks = PngImagePlugin.PngInfo()
        chunks.add_itxt("parameters", text)
        chunks.add_itxt("XML:com.adobe.xmp", xmp.decode())
        picture.save(file, "PNG", pnginfo=chunks)
    elif encoding.image_format == "webp":
        picture.save(file, "WEBP", quality=encoding.quality, exif=_exif(text), xmp=xmp)
    else:
        picture.save(file, "JPEG", quality=encoding.quality, exif=_exif(text), xmp=xmp)
    return file.getvalue()


def parameters(file: bytes) -> dict[str, Any]:
    """Return the values that `encode` put into an image file.

    Raises:
        ValueError: the file carries none.
    """
    with Image.open(io.BytesIO(file)) as picture:
        packet = picture.info.get("xmp") or picture.info.get("XML:com.adobe.xmp") or b""
    text = packet.decode() if isinstance(packet, bytes) else packet
    found = re.search(r"sdbatch:parameters=(?:\"([^\"]*)\"|'([^']*)')", text)
    if found is None:
        raise ValueError("the image carries no parameters of sdbatch")
    values: dict[str, Any] = json.loads(unescape(found[1] or found[2], {"&quot;": '"'}))
    return values


def infotext(said: dict[str, Any]) -> str:
    """Return the parameters as AUTOMATIC1111's `create_infotext` lays them out."""
    negative = f"\nNegative prompt: {said['negative_prompt']}" if said["negative_prompt"] else ""
    # AUTOMATIC1111 counts the text encoder's layers from its end, the last as 1
    skip = f"Clip skip: {said['clip_skip'] + 1}, " if said["clip_skip"] else ""
    eta = f"Eta: {said['eta']:g}, " if said["eta"] else ""
    return (
        f"{said['prompt']}{negative}\n"
        f"Steps: {said['num_inference_steps']}, Sampler: {samplers.title(said['sampler'])}, "
        f"CFG scale: {said['guidance_scale']:g}, Seed: {said['seed']}, "
        f"Size: {said['width']}x{said['height']}, Model hash: {said['model_hash'][:10]}, "
        f"Model: {_quoted(said['model'])}, {skip}{eta}RNG: CPU, Version: {said['software']}"
    )


def _quoted(value: str) -> str:
    """Quote a value that holds a separator, as AUTOMATIC1111's readers expect."""
    return json.dumps(value, ensure_ascii=False) if set(value) & set(",:\n") else value


def _exif(text: str) -> bytes:
    exif = Image.Exif()
    comment = b"UNICODE\0" + text.encode("utf-16-be")  # Exif 2.32, sec. 4.6.5, UserComment
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
    return exif.tobytes()


def _xmp(said: dict[str, Any]) -> bytes:
    return (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/">'
        '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" '
        'xmlns:sdbatch="urn:sdbatch:1" '
        f'Iptc4xmpExt:DigitalSourceType="{MADE_BY_A_MODEL}" '
        f"sdbatch:parameters={quoteattr(json.dumps(said))}/>"
        "</rdf:RDF></x:xmpmeta>"
    ).encode()

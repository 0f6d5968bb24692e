"""An image as a file that carries its parameters and the disclosure that a model made it.

Each file holds
- the generation parameters in the text form of AUTOMATIC1111: PNG text `parameters`, in JPEG and
  WebP the EXIF UserComment;
- the same values as JSON, and IPTC's digital source type, in XMP: "trainedAlgorithmicMedia", or for
  an image that was drawn from a picture "compositeWithTrainedAlgorithmicMedia".
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

from sdbatch import prompt_syntax, registry, sampling, schema
from sdbatch.job import Job
from sdbatch.output import identity
from sdbatch.sampling import Sampling

# IPTC's digital source types: https://cv.iptc.org/newscodes/digitalsourcetype
EDITED_BY_A_MODEL = (
    "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"
)
MADE_BY_A_MODEL = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
# Characters of a text inside the file; the table has all of it.
LONGEST = 2000
MOST_BYTES = 60_000  # of the XMP: a JPEG segment holds 64 KiB
_TEXTS = ("prompt", "negative_prompt", "row_key")
_HASHES = tuple(field.name for field in schema.INPUT_HASHES)
_ROW_VALUES = tuple(
    field.name for field in (*schema.SAMPLING, *schema.ROW) if field not in schema.INPUT_HASHES
)
# The order of AUTOMATIC1111's text; other keys follow where they have a label and are not default,
# or are of a picture, a mask, a variation or hires fix, and the row has that.
_FIRST = ("num_inference_steps", "sampler", "guidance_scale", "seed")
_OF_PICTURES = ("strength", "image_guidance_scale")
_OF_MASKS = ("mask_blur", "only_masked", "only_masked_padding")
_SWITCHES = {
    "variation_seed": "variation_strength",
    "variation_strength": "variation_strength",
    "hires_scale": "hires_scale",
    "hires_upscaler": "hires_scale",
    "hires_steps": "hires_scale",
    "hires_strength": "hires_scale",
}
_DEFAULTS = {name: field.default for name, field in Sampling.model_fields.items()}
_LABELLED = sorted(
    (key.a1111_label, name) for name, key in sampling.KEYS.items() if key.a1111_label
)


@dataclass(frozen=True)
class Encoding:
    """How images are encoded, and the model that drew them, for their metadata."""

    image_format: str  # one of registry.IMAGE_FORMATS
    quality: int | None  # None: the format is lossless
    model: str
    model_hash: str
    software: str
    compression: int | None = None  # of PNG; None: Pillow's default


def encoding_of(job: Job) -> Encoding:
    """Return how the images of a resolved job are encoded and what they say of their model."""
    return Encoding(
        image_format=job.output.image_format,
        quality=job.output.encoder_quality,
        model=job.model.name,
        model_hash=job.model.sha256 or job.model.revision or "",
        software=f"sdbatch {identity.versions()['sdbatch']}",
        compression=job.output.compression,
    )


def encode_image(image: NDArray[np.uint8], row: dict[str, Any], encoding: Encoding) -> bytes:
    """Return `image`, (H, W, 3) RGB, as a file that carries the values of `row`."""
    kind = registry.IMAGE_FORMATS[encoding.image_format]
    values, xmp = _written_values(row, encoding)
    text = infotext(values)
    options: dict[str, Any] = {} if kind.quality is None else {"quality": encoding.quality}
    if kind.compression is not None and encoding.compression is not None:
        options["compress_level"] = encoding.compression
    if kind.metadata == "text":
        chunks = PngImagePlugin.PngInfo()
        chunks.add_itxt("parameters", text)
        chunks.add_itxt("XML:com.adobe.xmp", xmp.decode())
        options["pnginfo"] = chunks
    else:
        options |= {"exif": _exif(text), "xmp": xmp}
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind.pillow, **options)
    return file.getvalue()


def _written_values(row: dict[str, Any], encoding: Encoding) -> tuple[dict[str, Any], bytes]:
    """Return the values that go into the file, with texts cut until they fit, and their XMP."""
    longest = LONGEST
    while True:
        values = {name: row[name] for name in _ROW_VALUES}
        values |= {name: row[name] for name in _HASHES if row.get(name) is not None}
        for name in _TEXTS:
            if len(values[name]) > longest:
                values[name], values[f"{name}_cut_at"] = values[name][:longest], longest
        values |= {
            "model": encoding.model,
            "model_hash": encoding.model_hash,
            "software": encoding.software,
        }
        xmp = _xmp(values)
        if len(xmp) <= MOST_BYTES or not longest:
            return values, xmp
        longest //= 2


def read_parameters(file: bytes) -> dict[str, Any]:
    """Return the values that `encode_image` put into an image file.

    Raises:
        ValueError: the file carries no parameters.
    """
    with Image.open(io.BytesIO(file)) as picture:
        packet = picture.info.get("xmp") or picture.info.get("XML:com.adobe.xmp") or b""
    text = packet.decode() if isinstance(packet, bytes) else packet
    found = re.search(r"sdbatch:parameters=(?:\"([^\"]*)\"|'([^']*)')", text)
    if found is None:
        raise ValueError("the image carries no parameters of sdbatch")
    values: dict[str, Any] = json.loads(unescape(found[1] or found[2], {"&quot;": '"'}))
    return values


def infotext(values: dict[str, Any]) -> str:
    """Return the parameters in the layout of AUTOMATIC1111's `create_infotext`."""
    negative = (
        f"\nNegative prompt: {values['negative_prompt']}" if values["negative_prompt"] else ""
    )
    others = [
        (label, name) for label, name in _LABELLED if name not in _FIRST and _is_used(name, values)
    ]
    parts = {
        **{str(sampling.KEYS[name].a1111_label): _written(name, values) for name in _FIRST},
        "Size": f"{values['width']}x{values['height']}",
        "Model hash": values["model_hash"][:10],
        "Model": _quoted(values["model"]),
        **{label: _written(name, values) for label, name in others},
        "RNG": "CPU",
        "Version": values["software"],
    }
    line = ", ".join(f"{label}: {value}" for label, value in parts.items())
    tags = prompt_syntax.lora_tags(values["loras"])
    return f"{values['prompt']}{tags}{negative}\n{line}"


def _is_used(name: str, values: dict[str, Any]) -> bool:
    """Tell whether a key says something of the image: in most cases if it is not the default."""
    if name in _OF_PICTURES:
        return "image_sha256" in values
    if name in _OF_MASKS:
        from_alpha = "image_sha256" in values and values["mask_from_alpha"]
        return "mask_sha256" in values or from_alpha
    switch = _SWITCHES.get(name, name)
    return bool(values[switch] != _DEFAULTS[switch])


def _written(name: str, values: dict[str, Any]) -> str:
    return str(sampling.KEYS[name].a1111_value(values[name]))


def _quoted(value: str) -> str:
    """Quote a value that holds a separator, as AUTOMATIC1111's readers expect."""
    return json.dumps(value, ensure_ascii=False) if set(value) & set(",:\n") else value


def _exif(text: str) -> bytes:
    exif = Image.Exif()
    comment = b"UNICODE\0" + text.encode("utf-16-be")  # Exif 2.32, sec. 4.6.5, UserComment
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
    return exif.tobytes()


def _xmp(values: dict[str, Any]) -> bytes:
    source = EDITED_BY_A_MODEL if "image_sha256" in values else MADE_BY_A_MODEL
    return (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/">'
        '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" '
        'xmlns:sdbatch="urn:sdbatch:1" '
        f'Iptc4xmpExt:DigitalSourceType="{source}" '
        f"sdbatch:parameters={quoteattr(json.dumps(values))}/>"
        "</rdf:RDF></x:xmpmeta>"
    ).encode()

"""The colours of any picture file as 8-bit RGB or grey, and its transparency."""

import numpy as np
from PIL import Image, ImageChops, ImageCms

_DEEP = ("I", "F")  # and I;16, in any order of its bytes


def split_alpha(picture: Image.Image, where: str) -> tuple[Image.Image, Image.Image | None]:
    """Return the RGB picture and its alpha, L; None where every pixel is opaque.

    The colours under transparent pixels are those of the file. `where` begins the text of an error.

    Raises:
        ValueError: its values have no known range.
    """
    picture = _to_8_bits(picture, where)
    if not picture.has_transparency_data:
        return _converted(picture, "RGB"), None
    picture = picture.convert("RGBA")
    alpha = picture.getchannel("A")
    return picture.convert("RGB"), None if alpha.getextrema() == (255, 255) else alpha


def to_grey(picture: Image.Image, where: str) -> tuple[Image.Image, Image.Image | None]:
    """Return the picture in grey, L, and its alpha as `split_alpha` does."""
    picture = _to_8_bits(picture, where)
    if not picture.has_transparency_data:
        return _converted(picture, "L"), None
    rgb, alpha = split_alpha(picture, where)
    return rgb.convert("L"), alpha


def _converted(picture: Image.Image, mode: str) -> Image.Image:
    return picture if picture.mode == mode else picture.convert(mode)  # which would copy it


def on_white(rgb: Image.Image, alpha: Image.Image | None) -> Image.Image:
    """Return the picture as it looks on a white page; changes `rgb`."""
    if alpha is not None:
        rgb.paste((255, 255, 255), mask=ImageChops.invert(alpha))
    return rgb


def _to_8_bits(picture: Image.Image, where: str) -> Image.Image:
    """Return a picture of a mode that Pillow converts rightly: 16 bits are clipped by some."""
    if picture.mode == "LAB":  # Pillow has no conversion but that of colour profiles
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(picture, *profiles, outputMode="RGB")
        assert converted is not None, "only a conversion in place returns None"
        return converted
    if picture.mode not in _DEEP and not picture.mode.startswith("I;16"):
        return picture
    values = np.asarray(picture)
    low, high = values.min(), values.max()
    if picture.mode == "F":
        if not 0 <= low <= high <= 1:  # false of a NaN too
            raise ValueError(
                f"{where} of decimal numbers from {low:g} to {high:g}: must be from 0 to 1. "
                f"Save it with 8 bits"
            )
        grey = np.rint(values * 255)
    else:
        if not 0 <= low <= high <= 65535:
            raise ValueError(
                f"{where} of numbers from {low} to {high}: must be of 16 bits, 0 to 65535. "
                f"Save it with 8 bits"
            )
        grey = (values.astype(np.uint32) + 128) // 257  # 65535 is 255 * 257
    converted = Image.fromarray(grey.astype(np.uint8))
    clear = picture.info.get("transparency")  # PNG: the one value that is transparent
    if isinstance(clear, int):
        converted.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return converted

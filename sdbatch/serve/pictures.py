"""The pictures of a request: from base64, and masks as each API defines them."""

import base64
import binascii
import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from PIL import Image, ImageOps

from sdbatch.errors import short_repr
from sdbatch.inputs.picture import read_picture
from sdbatch.inputs.prepare import Prepared, prepare
from sdbatch.sampling import Sampling
from sdbatch.serve.errors import Faults, invalid_request, invalid_value


@dataclass(frozen=True)
class Pictures:
    """The picture files of a request, and how they are read."""

    image: bytes
    mask: bytes | None
    read_mask: Callable[[bytes], bytes]  # to a mask that is white where the image is drawn anew
    image_param: str = "image"  # the API's name of it

    def prepare(self, sampling: Sampling) -> Prepared:
        """Fit the pictures to an image; takes up to a second.

        Raises:
            ApiError: a file is no picture, or does not fit.
        """
        mask, faults = None, Faults()
        if self.mask is not None:
            with faults.collect(), _errors_of({"image": "mask"}):
                mask = self.read_mask(self.mask)
        with faults.collect(), _errors_of({"image": self.image_param, "mask_image": "mask"}):
            prepared = prepare(sampling, self.image, mask)
        faults.raise_any()
        return prepared


@contextmanager
def _errors_of(params: Mapping[str, str]) -> Iterator[None]:
    """Turn the reason of a picture that cannot be used into the error response.

    Args:
        params: the API's names of what a reason may begin with.
    """
    try:
        yield
    except ValueError as error:
        name, _, text = str(error).partition(" = ")
        if name in params:
            raise invalid_value(params[name], text) from error
        raise invalid_request(error) from error


def from_base64(text: str, param: str) -> bytes:
    """Return the file that a base64 text or a data URI holds.

    Raises:
        ApiError: it holds none.
    """
    if text.startswith("data:"):
        head, _, text = text.partition(",")
        if not head.endswith(";base64"):
            raise invalid_value(param, f"{short_repr(head)}: must be a data URI with ;base64")
    try:
        file = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        file = b""
    if not file:
        raise invalid_value(
            param,
            f"{short_repr(text)}: must be a picture's file in base64, or a data URI; URLs are not "
            f"fetched",
        )
    return file


def is_transparent(file: bytes) -> bool:
    """Tell whether a picture has transparent parts; raises an ApiError if it is no picture."""
    with _errors_of({"image": "image"}):
        return read_picture(file, keep_alpha=True).alpha is not None


def transparent_parts(file: bytes) -> bytes:
    """Return the mask of the parts of a picture that are transparent, as OpenAI defines masks.

    Raises:
        ValueError: the file is no picture, or has no transparent parts.
    """
    alpha = read_picture(file, keep_alpha=True).alpha
    if alpha is None:
        raise ValueError(
            "image = a picture without transparent parts: what is drawn anew must be transparent. "
            "Save it as PNG with an alpha channel"
        )
    return _png(ImageOps.invert(alpha))


def light_parts(file: bytes, invert: bool) -> bytes:
    """Return the mask of the light parts of a picture, as AUTOMATIC1111 defines masks.

    Of a picture with transparent parts, its opacity counts. Source: modules/processing.py,
    create_binary_mask.

    Raises:
        ValueError: the file is no picture.
    """
    picture = read_picture(file, keep_alpha=True)
    mask = picture.alpha or picture.rgb.convert("L")
    return _png(ImageOps.invert(mask) if invert else mask)


def _png(mask: Image.Image) -> bytes:
    file = io.BytesIO()
    mask.save(file, "PNG", compress_level=1)
    return file.getvalue()

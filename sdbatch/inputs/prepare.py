"""A row's pictures: fitted to the image that is drawn, and put back around what was drawn.

What a row needs travels from the process that reads to the one that draws as lossless files in
one sequence of bytes.
"""

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops

from sdbatch.inputs import masks
from sdbatch.inputs.picture import Picture, read_mask, read_picture
from sdbatch.inputs.placement import Size, place, same_shape
from sdbatch.sampling import Sampling

DRAWN = 128  # from this value of the mask on, a pixel is drawn anew
_STRIP = 256  # rows


@dataclass(frozen=True)
class Prepared:
    """The pictures of a row, as files.

    `image` and `mask` are what the engine gets. With a mask also `original`, into which the drawn
    image is put, and `weights`, how much of each of its pixels is drawn.
    """

    files: Mapping[str, bytes]
    sha256: Mapping[str, str]  # of the input files as they came: `image`, `mask`
    box: tuple[int, ...] = ()  # of the original, that the weights cover
    part: tuple[int, ...] = ()  # of the drawn image, that is put there
    keep_alpha: bool = False  # how the original is read
    resample: str = "lanczos"  # the filter by which a cut-out returns to its size

    @cached_property
    def arrays(self) -> Mapping[str, NDArray[np.uint8]]:
        """Return the engine's `Request.inputs`: `image`, and `mask` if there is one."""
        return {name: _decode(self.files[name]) for name in ("image", "mask") if name in self.files}

    def finish(self, drawn: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return the drawn image with what is not masked as it was, exactly.

        Without a mask that is `drawn` itself. What is cut out by only_masked returns in the whole
        picture, so the result has the picture's size.
        """
        if "weights" not in self.files:
            return drawn
        original = read_picture(self.files["original"], keep_alpha=self.keep_alpha).rgb
        left, top, right, bottom = self.part
        piece = drawn[top:bottom, left:right]
        left, top, right, bottom = self.box
        size = right - left, bottom - top
        if size != (piece.shape[1], piece.shape[0]):
            piece = np.asarray(Image.fromarray(piece).resize(size, _filter(self.resample)))
        under = np.asarray(original.crop((left, top, right, bottom)))
        mixed = masks.blend(under, piece, _decode(self.files["weights"]))
        original.paste(Image.fromarray(mixed), (left, top))
        return _pixels_of(original)

    def to_bytes(self) -> bytes:
        """Return all of it as bytes."""
        data = io.BytesIO()
        facts = {
            "sha256": dict(self.sha256),
            "box": self.box,
            "part": self.part,
            "keep_alpha": self.keep_alpha,
            "resample": self.resample,
        }
        with zipfile.ZipFile(data, "w") as members:
            for name, file in {"facts": json.dumps(facts).encode(), **self.files}.items():
                members.writestr(zipfile.ZipInfo(name), file)  # without the time of day
        return data.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Prepared":
        """Return what `to_bytes` made bytes of."""
        with zipfile.ZipFile(io.BytesIO(data)) as members:
            files = {name: members.read(name) for name in members.namelist()}
        facts = json.loads(files.pop("facts"))
        return cls(files, **{**facts, "box": tuple(facts["box"]), "part": tuple(facts["part"])})


def refit(sampling: Sampling, drawn: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Fit a drawn image (H, W, 3) to the height and width of an image that is drawn from it."""
    image = Image.fromarray(drawn)
    placement = place(sampling.fit, image.size, (sampling.width, sampling.height))
    return placement.apply(image, _filter(sampling.resample), border=0)


def prepare(sampling: Sampling, image: bytes, mask: bytes | None = None) -> Prepared:
    """Fit a row's picture files to its image.

    A mask is white where the image is drawn anew; without one, what is transparent is, if
    `mask_from_alpha` says so. It is placed as the picture is, whatever its own size. The borders of
    `fit: pad` are drawn anew wherever there is a mask: so a picture is continued beyond its edges.

    Raises:
        ValueError: the pictures cannot be used. The text is the row's failure.
    """
    files = {"image": image} | ({} if mask is None else {"mask": mask})
    sha256 = {name: hashlib.sha256(file).hexdigest() for name, file in files.items()}
    if mask is None and not sampling.mask_from_alpha:
        picture = read_picture(image, enough=_enough(sampling))
        return Prepared({"image": _encode(_fit_picture(sampling, picture))}, sha256)
    if sampling.hires_scale > 1:
        raise ValueError(
            f"hires_scale = {sampling.hires_scale:g}: must be 1 in a row with a mask, whose "
            f"picture keeps its size. Set height and width to the size to draw at"
        )
    picture = read_picture(
        image,
        keep_alpha=mask is None,
        enough=None if sampling.only_masked else _enough(sampling),
    )
    grey = _mask_from_alpha(picture) if mask is None else _mask_of_shape(mask, picture.size)
    if not sampling.only_masked:
        return _fit_both(sampling, picture, grey, sha256)
    return _cut_out(sampling, picture, grey, image, sha256)


def _enough(sampling: Sampling) -> Size | None:
    """Return the size that a picture needs before it is resized well; None: its own."""
    if sampling.resample == "nearest":  # takes pixels of the picture as they are
        return None
    return 2 * sampling.width, 2 * sampling.height


def _mask_from_alpha(picture: Picture) -> Image.Image:
    if picture.alpha is None:
        raise ValueError(
            "image = a picture without transparent pixels: mask_from_alpha draws anew what is "
            "transparent. Erase the part to draw, or give a mask_image"
        )
    return ImageChops.invert(picture.alpha)


def _mask_of_shape(file: bytes, size: Size) -> Image.Image:
    mask = read_mask(file)
    if not same_shape(mask.size, size):
        raise ValueError(
            f"mask_image = {mask.width} x {mask.height} pixels: must have the shape of the image, "
            f"{size[0]} x {size[1]}, in the same or another size. Crop it as the image was cropped"
        )
    return mask


def _fit_picture(sampling: Sampling, picture: Picture) -> NDArray[np.uint8]:
    placement = place(sampling.fit, picture.size, (sampling.width, sampling.height))
    return placement.apply(picture.rgb, _filter(sampling.resample), border=0)


def _fit_both(
    sampling: Sampling, picture: Picture, grey: Image.Image, sha256: Mapping[str, str]
) -> Prepared:
    """Fit the picture and its mask to the image, in the same way."""
    size = sampling.width, sampling.height
    fitted = _fit_picture(sampling, picture)
    placement = place(sampling.fit, picture.size, size)
    mask = masks.blur(placement.apply(grey, _mask_filter(sampling), border=255), sampling.mask_blur)
    # AUTOMATIC1111 lets the soft edge end outside of the mask, so that nothing shines through
    weights = np.where(mask < DRAWN, 2 * mask, 255) if sampling.compat == "a1111" else mask
    files = _files_of(sampling, fitted, mask, weights.astype(np.uint8))
    whole = (0, 0, *size)
    return Prepared({**files, "original": _encode(fitted)}, sha256, box=whole, part=whole)


def _cut_out(
    sampling: Sampling,
    picture: Picture,
    grey: Image.Image,
    original: bytes,
    sha256: Mapping[str, str],
) -> Prepared:
    """Cut the mask's surroundings out of the picture, enlarged or reduced to the image."""
    size = sampling.width, sampling.height
    if grey.size != picture.size:
        grey = grey.resize(picture.size, _mask_filter(sampling))
    weights = masks.blur(np.asarray(grey), sampling.mask_blur)
    _check_drawn(weights)
    box = masks.region_of(weights, sampling.only_masked_padding, size)
    left, top, right, bottom = box
    weights = weights[top:bottom, left:right]
    placement = place("pad", (right - left, bottom - top), size)
    region = placement.apply(picture.rgb.crop(box), _filter(sampling.resample), border=None)
    mask = placement.apply(Image.fromarray(weights), _mask_filter(sampling), border=None)
    return Prepared(
        {**_files_of(sampling, region, mask, weights), "original": original},
        sha256,
        box=box,
        part=placement.target,
        keep_alpha=picture.alpha is not None,
        resample=sampling.resample,
    )


def _files_of(
    sampling: Sampling,
    image: NDArray[np.uint8],
    mask: NDArray[np.uint8],
    weights: NDArray[np.uint8],
) -> dict[str, bytes]:
    _check_drawn(mask)
    if sampling.mask_fill != "original":  # of noise and nothing too, as in AUTOMATIC1111
        image = masks.fill(image, mask)
    return {"image": _encode(image), "mask": _encode(mask), "weights": _encode(weights)}


def _check_drawn(mask: NDArray[np.uint8]) -> None:
    if mask.max() < DRAWN:
        raise ValueError(
            f"mask = nothing to draw, its brightest pixel is {mask.max()}: must be white, "
            f"{DRAWN} to 255, where the image is drawn anew after `fit` and mask_blur. "
            f"Leave the mask out to draw all of it"
        )


def _filter(name: str) -> Image.Resampling:
    return Image.Resampling[name.upper()]


def _mask_filter(sampling: Sampling) -> Image.Resampling:
    """Return the filter for masks: lanczos and bicubic would ring far from the edge."""
    rings = sampling.resample in ("lanczos", "bicubic")
    return Image.Resampling.BILINEAR if rings else _filter(sampling.resample)


def _pixels_of(picture: Image.Image) -> NDArray[np.uint8]:
    """Return the pixels, (H, W, 3), strip by strip: np.asarray holds a photo twice meanwhile."""
    pixels = np.empty((picture.height, picture.width, 3), np.uint8)
    for top in range(0, picture.height, _STRIP):
        bottom = min(top + _STRIP, picture.height)
        pixels[top:bottom] = np.asarray(picture.crop((0, top, picture.width, bottom)))
    return pixels


def _encode(pixels: NDArray[np.uint8]) -> bytes:
    """Return pixels as a lossless file; WebP so is faster than PNG, and has no grey."""
    file = io.BytesIO()
    if pixels.ndim == 2:
        Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    else:
        Image.fromarray(pixels).save(file, "WEBP", lossless=True, quality=0, method=0)
    return file.getvalue()


def _decode(file: bytes) -> NDArray[np.uint8]:
    return np.array(Image.open(io.BytesIO(file)))  # a copy that torch may share
